"""A linear head, fitted to frozen features."""

from __future__ import annotations

import math

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
        ``weight`` of shape ``(P, C, d)`` and ``bias`` of shape ``(P, C)``, in float32. They are
        NaN where a prompt's features are not finite.
    """
    n_prompts, _, width = features.shape
    features = features.detach().double()
    weight = features.new_full((n_prompts, n_labels, width), math.nan)
    bias = features.new_full((n_prompts, n_labels), math.nan)
    is_finite = features.isfinite().all(-1).all(-1)  # (P,)
    if is_finite.any():
        fitted = logistic_regressions(features[is_finite], labels, n_labels, [_PENALTY])
        ((weight[is_finite], bias[is_finite]),) = fitted
    return {"weight": weight.float(), "bias": bias.float()}


def linear(features: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Logits (P, B, C) of features (P, B, d) under one head a prompt."""
    return torch.einsum("pbd,pcd->pbc", features, head["weight"]) + head["bias"].unsqueeze(1)
