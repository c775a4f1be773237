"""A prompt as named tensors, and the kinds of prompt that there are.

================  ==================  ====================================================
notation          shape               meaning
================  ==================  ====================================================
``P``                                 prompts at once: a population, a screening, or one
``L``, ``d``                          virtual tokens of a prompt, width of an embedding
``tensors[name]`` (P, …)              what is trained, the head included
``layers()[0]``   (P, 1 or B, L, d)   virtual tokens before the input
``layers()[i]``   (P, 1 or B, L, d)   what is added to their hidden states before layer i
``words()``       (P, L, d)           what can be read as words
================  ==================  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Literal
from typing import Protocol

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.split import Split


#: What a model reads: texts to classify, or the names of the labels.
Side = Literal["texts", "labels"]
Tensors = Mapping[str, Tensor]
HEAD_PREFIX = "head."


def place_of(name: str) -> tuple[Side, int]:
    """The side and the layer of a tensor by its name: ``texts`` is at 0, ``texts.2`` at 2.

    What makes virtual tokens for the input, such as ``texts.gate.u.up``, is at 0, too.
    """
    side, _, rest = name.partition(".")
    return ("labels" if side == "labels" else "texts"), int(rest) if rest.isdigit() else 0


def is_of(name: str, part: str) -> bool:
    """Whether a tensor belongs to a side, or to the head."""
    return name.partition(".")[0] == part


def is_gate(name: str) -> bool:
    """Whether a tensor is a weight of what makes virtual tokens for each input."""
    return ".gate." in name


@dataclass(frozen=True)
class Placement:
    """Where a model takes virtual tokens.

    Attributes:
        sides: The inputs that can carry a prompt, the usual one first.
        n_layers: Layers of the encoder. Layer 0 takes the prompt at the input embeddings.
        layer_width: Width of the hidden states before the further layers; 0 if these take no
            prompt.
        encoding_width: Width of a split's encodings; 0 if it has none.
        max_virtual_tokens: The longest prompt that fits into the positions of the usual side.
        room: The same for the other sides.
    """

    sides: tuple[Side, ...]
    n_layers: int
    max_virtual_tokens: int
    room: Mapping[Side, int] = field(default_factory=dict)
    layer_width: int = 0
    encoding_width: int = 0


class PromptKind(Protocol):
    """How prompts start, where their virtual tokens go, and what of them can be read as words."""

    @property
    def name(self) -> str:
        """The kind's name, for checkpoints."""

    @property
    def needs_gradient(self) -> bool:
        """Whether only gradients can train it.

        Stages without gradients search around embeddings and hidden states.
        """

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        """The tensors of ``P`` prompts that start at words.

        Args:
            embeddings: The words' embeddings, of shape ``(P, L, d)``.
            placement: Where the model takes virtual tokens.
        """

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        """What stands before the inputs of a side, by layer; empty if nothing does.

        Args:
            tensors: The prompts' tensors.
            side: Which input it is.
            batch: The inputs, for kinds whose virtual tokens depend on them.

        Returns:
            Tensors of shape ``(P, 1, L, d)``, or ``(P, B, L, d)`` if they depend on the input:
            at layer 0 virtual tokens, at further layers what is added to their hidden states.
        """

    def words(self, tensors: Tensors) -> Tensor:
        """The virtual tokens that can be read as words, of shape ``(P, L, d)``."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """``P`` prompts of one kind, each with the head that was trained with it.

    Kept in float32 whatever the frozen model's precision is: steps of a learning rate of 1e-3
    vanish in half precision.

    Attributes:
        kind: The kind.
        tensors: Named tensors, each with a leading dimension ``P``. Names of a head start with
            ``head.``.
    """

    kind: PromptKind
    tensors: Tensors = field(repr=False)

    def __post_init__(self) -> None:
        sizes = {name: len(t) if t.ndim else None for name, t in self.tensors.items()}
        if len(set(sizes.values())) != 1 or None in sizes.values():
            raise ValueError(f"The tensors of a prompt must have one leading size, got {sizes}.")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Sequence[int]) -> Prompt:
        return self.map(lambda tensor: tensor[index])

    @property
    def head(self) -> dict[str, Tensor]:
        """The tensors of the head, by their names without the prefix."""
        return {
            name.removeprefix(HEAD_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(HEAD_PREFIX)
        }

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors without the head, by side and layer, in their order."""
        names = (name for name in self.tensors if not is_of(name, "head"))
        return {name: self.tensors[name] for name in sorted(names, key=place_of)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Prompt:
        """The same prompts with every tensor changed."""
        return Prompt(self.kind, {name: change(t) for name, t in self.tensors.items()})

    def with_head(self, head: Tensors) -> Prompt:
        """The same prompts with heads; a head of one prompt serves all."""
        spread = {
            HEAD_PREFIX + name: rows.expand(len(self), *rows.shape[1:]) if len(rows) == 1 else rows
            for name, rows in head.items()
        }
        return Prompt(self.kind, {**self.tensors, **spread})

    def layers(self, side: Side, batch: Split) -> dict[int, Tensor]:
        """Virtual tokens of a side by layer; see :meth:`PromptKind.layers`."""
        return self.kind.layers(self.tensors, side, batch)

    def words(self) -> Tensor:
        """Virtual tokens that can be read as words, of shape ``(P, L, d)``."""
        return self.kind.words(self.tensors)

    def is_finite(self) -> bool:
        """Whether no tensor holds a NaN or an infinity."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors.values())


def stacked(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of one kind and length as one of so many ``P``."""
    names = prompts[0].tensors
    return Prompt(
        prompts[0].kind, {n: torch.cat([prompt.tensors[n] for prompt in prompts]) for n in names}
    )
