"""A linear head, fitted to frozen features."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.logistic import logistic_regressions


_PENALTY = 0.05


def fit_heads(features: Tensor, labels: Tensor, n_labels: int) -> dict[str, Tensor]:
    """L2-regularised logistic regressions, one a prompt, fitted at once.

    They minimise the mean cross entropy plus ``0.05`` times the squared weights.

    Args:
        features: Features of shape ``(P, B, d)``.
        labels: Label indices of shape ``(B,)``.
        n_labels: ``C``.

    Returns:
        ``weight`` of shape ``(P, C, d)`` and ``bias`` of shape ``(P, C)``, in float32.
    """
    features = features.detach().double()
    ((weight, bias),) = logistic_regressions(features, labels, n_labels, [_PENALTY])
    return {"weight": weight.float(), "bias": bias.float()}


def linear(features: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Logits (P, B, C) of features (P, B, d) under one head a prompt."""
    return torch.einsum("pbd,pcd->pbc", features, head["weight"]) + head["bias"].unsqueeze(1)
