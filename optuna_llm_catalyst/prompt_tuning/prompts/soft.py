"""The soft prompt: trainable embeddings at the input (prompt tuning, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.prompts.base import Placement
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.split import Split


@dataclass(frozen=True)
class SoftPrompt:
    """``L`` embeddings before the input of the model's usual side: one tensor, named by it."""

    name: str = "soft"

    def start(self, embeddings: Tensor, placement: Placement) -> dict[str, Tensor]:
        return {placement.sides[0]: embeddings}  # (P, L, d)

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        del batch
        return {0: tensors[side].unsqueeze(1)} if side in tensors else {}  # (P, 1, L, d)

    def words(self, tensors: Tensors) -> Tensor:
        return next(tensors[side] for side in ("labels", "texts") if side in tensors)  # (P, L, d)
