"""A linear head, fitted to frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
import torch.nn.functional as F


_L2 = 0.1
_MAX_STEPS = 200
_TOLERANCE = 1e-6


@torch.enable_grad()
def fit_heads(features: Tensor, labels: Tensor, n_labels: int) -> dict[str, Tensor]:
    """L2-regularised logistic regressions, one a prompt, fitted at once.

    They minimise the mean cross entropy plus ``0.1 / 2`` times the squared weights. The fit is in
    float64 and ends where no slope is above 1e-6, so it depends on its arguments and hardly on
    the machine.

    Args:
        features: Features of shape ``(P, B, d)``.
        labels: Label indices of shape ``(B,)``.
        n_labels: ``C``.

    Returns:
        ``weight`` of shape ``(P, C, d)`` and ``bias`` of shape ``(P, C)``, in float32.
    """
    n_prompts, n_examples, _ = features.shape
    centre = features.double().mean(1, keepdim=True)  # (P, 1, d)
    basis, scale = _coordinates(features.double() - centre)
    inputs = (features.double() - centre) @ basis.mT  # (P, B, r)
    weight = inputs.new_zeros(n_prompts, n_labels, inputs.shape[-1], requires_grad=True)
    bias = inputs.new_zeros(n_prompts, n_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    targets = labels.repeat(n_prompts)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight.mT + bias.unsqueeze(1)  # (P, B, C)
        # The regressions share no variable: the sum's minimum is each one's minimum.
        fit = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / n_examples
        objective = fit + _L2 / 2 * (weight * scale.unsqueeze(1)).square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    full = weight.detach() @ basis  # (P, C, d)
    shift = (full @ centre.mT).squeeze(-1)  # (P, C)
    return {"weight": full.float(), "bias": (bias.detach() - shift).float()}


def _coordinates(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Directions in which the fit is about equally steep, and how long a step in each is.

    Real features have a few strong directions and many weak ones, in which a fit is slow. The
    weights lie in the span of the features, so nothing is lost.

    Args:
        centred: Features without their mean, of shape ``(P, B, d)``.

    Returns:
        Directions of shape ``(P, r, d)`` and their lengths ``(P, r)``.
    """
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    scale = (sizes.square() / (2 * centred.shape[1]) + _L2).rsqrt()  # (P, r)
    return directions * scale.unsqueeze(-1), scale


def linear(features: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Logits (P, B, C) of features (P, B, d) under one head a prompt."""
    return torch.einsum("pbd,pcd->pbc", features, head["weight"]) + head["bias"].unsqueeze(1)
