"""Low-rank prompts: virtual tokens that depend on the input (LoPA, arXiv 2405.15282).

``Z = 2 Z_S * sigmoid(U(e) V(e)^T)``: a soft prompt times a gate. ``e`` is the input's encoding
without a prompt by the frozen encoder; ``U`` and ``V`` are ``Linear(tanh(Linear(e)))`` each.

==================  ============  =========================================================
tensor              shape         meaning
==================  ============  =========================================================
``SIDE``            (P, L, d)     the soft part ``Z_S``
``SIDE.gate.u.…``   (P, …)        weights of ``U``, whose output is ``(L, r)``
``SIDE.gate.v.…``   (P, …)        weights of ``V``, whose output is ``(d, r)``
==================  ============  =========================================================

``U`` starts at zero. Every gate is then a half, so an untrained low-rank prompt is the soft prompt
of the same words. ``V`` starts at small random numbers, so that gradients reach ``U`` from the
first step on. The paper has no 2: with it, ``Z_S`` is an embedding that can be read as a word, and
its learning rate means what it means for a soft prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.prompts.base import Placement
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split


#: Standard deviation of the random weights, as in the authors' code.
_DEVIATION = 0.02


@dataclass(frozen=True)
class LowRankPrompt(SoftPrompt):
    """``L`` embeddings before the input of the model's usual side, times a gate for each input.

    What can be read as words is the soft part: the prompt at a gate of a half.

    Attributes:
        rank: ``r``, the rank of ``U V^T``; more than ``L`` or ``d`` adds nothing.
        hidden: Width of the hidden layer of ``U`` and of ``V``.
    """

    name: str = field(default="lowrank", init=False)
    rank: int = 4
    hidden: int = 64

    def __post_init__(self) -> None:
        check_at_least(1, rank=self.rank, hidden=self.hidden)

    @property
    def needs_gradient(self) -> bool:
        return True

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        if not placement.encoding_width:
            raise ValueError(
                "A low-rank prompt depends on the encoding of each input without a prompt, which "
                "this model does not give."
            )
        tensors = super().start(embeddings, placement)
        for name, rows in list(tensors.items()):
            tensors |= self._gate(name, rows, placement.encoding_width)
        return tensors

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        if side not in tensors:
            return {}
        u, v = factors(tensors, side, batch.encodings())
        return {0: 2 * tensors[side].unsqueeze(1) * torch.sigmoid(u @ v.mT)}  # (P, B, L, d)

    def _gate(self, name: str, rows: Tensor, encoding_width: int) -> dict[str, Tensor]:
        """The weights of ``U`` and ``V``, the same for each of ``P`` prompts."""
        n_prompts, *sizes = rows.shape  # (P, L, d)
        generator = torch.Generator().manual_seed(0)
        found: dict[str, Tensor] = {}
        for part, size in zip("uv", sizes, strict=True):
            n_out = size * self.rank
            down = torch.randn(self.hidden, encoding_width, generator=generator)
            up = torch.randn(n_out, self.hidden, generator=generator)
            found |= {
                f"{name}.gate.{part}.down": _DEVIATION * down,
                f"{name}.gate.{part}.down_bias": torch.zeros(self.hidden),
                f"{name}.gate.{part}.up": (0.0 if part == "u" else _DEVIATION) * up,
                f"{name}.gate.{part}.up_bias": torch.zeros(n_out),
            }
        return {n: t.to(rows.device).expand(n_prompts, *t.shape) for n, t in found.items()}


@dataclass(frozen=True)
class TwoSidedLowRankPrompt(LowRankPrompt, TwoSidedPrompt):
    """A low-rank prompt before each label's name and another one before each text."""

    name: str = field(default="two-sided-lowrank", init=False)


def factors(tensors: Tensors, side: Side, encodings: Tensor) -> tuple[Tensor, Tensor]:
    """``U`` and ``V`` of inputs, of the shapes ``(P, B, L, r)`` and ``(P, B, d, r)``.

    Args:
        tensors: The prompts' tensors.
        side: The side on which the prompt stands.
        encodings: Unit vectors of shape ``(B, h)``.
    """
    _, length, width = tensors[side].shape
    # Unit scale for every entry, however wide the encodings are: so are those that a head reads.
    scaled = encodings * encodings.shape[-1] ** 0.5
    u, v = (_network(tensors, f"{side}.gate.{part}", scaled) for part in "uv")
    return u.unflatten(-1, (length, -1)), v.unflatten(-1, (width, -1))


def sized(kind: LowRankPrompt, tensors: Tensors) -> LowRankPrompt:
    """The kind with the rank and the width of a prompt's tensors."""
    up = next(name for name in tensors if name.endswith(".gate.u.up"))
    length = tensors[up.partition(".")[0]].shape[1]
    _, n_out, hidden = tensors[up].shape  # (P, L * r, hidden)
    return replace(kind, rank=n_out // length, hidden=hidden)


def _network(tensors: Tensors, name: str, encodings: Tensor) -> Tensor:
    """``Linear(tanh(Linear(e)))`` of each prompt: (B, h) to (P, B, n)."""

    def linear(x: Tensor, layer: str) -> Tensor:
        weight, bias = tensors[f"{name}.{layer}"], tensors[f"{name}.{layer}_bias"]
        return x @ weight.mT + bias.unsqueeze(1)

    return linear(torch.tanh(linear(encodings, "down")), "up")
