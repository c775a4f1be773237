"""Deep prompts: virtual tokens at the input, and a change to them before every further layer.

That is BBTv2's prompt (arXiv 2205.11200): what is added to a virtual token's hidden state before
a layer starts at zero, so an untrained deep prompt is the soft prompt of the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.prompts.base import Placement
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt


@dataclass(frozen=True)
class DeepPrompt(SoftPrompt):
    """``L`` embeddings before the input of the model's usual side, and a change at each layer.

    The tensors are named by the side, and by the side and the layer: ``texts``, ``texts.1``, …
    """

    name: str = "deep"

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        return _with_layers(super().start(embeddings, placement), placement)


@dataclass(frozen=True)
class TwoSidedDeepPrompt(TwoSidedPrompt):
    """A deep prompt before each label's name and another one before each text."""

    name: str = "two-sided-deep"

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        return _with_layers(super().start(embeddings, placement), placement)


def _with_layers(inputs: dict[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    if not placement.layer_width:
        raise ValueError(
            "A deep prompt needs an encoder whose layers take a text's hidden states one after "
            "the other; this one takes a prompt at its input only."
        )
    changes = {
        f"{name}.{layer}": rows.new_zeros(*rows.shape[:2], placement.layer_width)  # (P, L, d)
        for name, rows in inputs.items()
        for layer in range(1, placement.n_layers)
    }
    return {**inputs, **changes}
