"""Gradient descent on a supervised contrastive loss (arXiv 2004.11362) of the prompted features.

The loss draws texts of one label together and others apart; no head has a part in it. A linear
head is fitted anew to the training texts whenever the prompt is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
import math

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.models import HasHead
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.gradient import GradientStage


@dataclass(frozen=True)
class ContrastiveStage(GradientStage):
    """A stage of gradient descent on the contrastive loss, for models with a linear head.

    What it trains is the prompt alone, so ``head_lr`` has no part in it.

    Attributes:
        temperature: Divides the cosines between texts.
        batch_size: Examples a batch. A text with no other of its label there counts nothing, so
            batches are larger than those of other losses.
    """

    temperature: float = 0.1
    batch_size: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")

    def _losses(self, run: Run, prompts: Prompt, batch: Split) -> Tensor:
        features = _with_head(run).prompted_features(prompts, batch)  # (P, B, d)
        return contrastive_losses(features, batch.labels, self.temperature)

    def _judged(self, run: Run, prompts: Prompt) -> Prompt:
        return _with_head(run).fresh_head(prompts, run.train)


def contrastive_losses(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of each prompt, in nats (arXiv 2004.11362, eq. 2).

    Args:
        features: Features of shape ``(P, B, d)``, of any length.
        labels: Label indices of shape ``(B,)``.
        temperature: Divides their cosines.

    Returns:
        Means over the texts that have others of their label, of shape ``(P,)``; 0 if none has.
    """
    units = F.normalize(features, dim=-1)
    is_self = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_same = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~is_self  # (B, B)
    logits = (units @ units.mT / temperature).masked_fill(is_self, -math.inf)  # (P, B, B)
    log_parts = F.log_softmax(logits, dim=-1).masked_fill(~is_same, 0.0)
    n_same = is_same.sum(-1)  # (B,)
    each = -log_parts.sum(-1) / n_same.clamp(min=1)  # (P, B)
    return each.sum(-1) / (n_same > 0).sum().clamp(min=1)


def _with_head(run: Run) -> HasHead:
    model = run.model
    assert isinstance(model, HasHead)  # The objective refuses others.
    return model
