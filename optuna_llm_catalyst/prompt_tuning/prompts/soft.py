"""Soft prompts: trainable embeddings at the input (prompt tuning, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.prompts.base import is_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import place_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import Placement
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.split import Split


@dataclass(frozen=True)
class SoftPrompt:
    """``L`` embeddings before the input of the model's usual side: one tensor, named by it."""

    name: str = "soft"

    @property
    def needs_gradient(self) -> bool:
        return False

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        return {placement.sides[0]: embeddings}  # (P, L, d)

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        del batch
        own = {place_of(name)[1]: rows for name, rows in tensors.items() if is_of(name, side)}
        return {layer: rows.unsqueeze(1) for layer, rows in own.items()}  # (P, 1, L, d)

    def words(self, tensors: Tensors) -> Tensor:
        return next(tensors[side] for side in ("labels", "texts") if side in tensors)  # (P, L, d)


@dataclass(frozen=True)
class TwoSidedPrompt(SoftPrompt):
    """``L`` embeddings before each label's name and as many before each text.

    Both start at the same words and are trained together; the texts' features then change with
    every step. Words are read off the labels' side.
    """

    name: str = "two-sided"

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        if set(placement.sides) != {"labels", "texts"}:
            raise ValueError(
                "A two-sided prompt needs a model that reads texts and the names of labels, such "
                f"as DualEncoderClassifier; this one takes prompts before: "
                f"{', '.join(placement.sides)}."
            )
        return {side: embeddings.clone() for side in placement.sides}
