"""Logistic regressions on frozen features: the one solver of the fits in this package.

================  =========  ==========================================================
notation          shape      meaning
================  =========  ==========================================================
``features``      (P, B, d)  ``P`` problems of ``B`` examples each, in float64
``directions``    (P, r, d)  orthonormal directions that span a problem's features
``inputs``        (P, B, r)  the features' coordinates along these directions
``weights``       (P, C, r)  what is fitted: one vector a label, in these coordinates
================  =========  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence

import torch
from torch import Tensor
import torch.nn.functional as F


_MAX_STEPS = 1000
_TOLERANCE = 1e-6
_N_REMEMBERED = 10
_LEAST_CURVATURE = 1e-3
#: The bias of a label without an example, whose best bias is minus infinity.
_UNSEEN_BIAS = -14.0


def logistic_regressions(
    features: Tensor, labels: Tensor, n_labels: int, penalties: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """L2-regularised logistic regressions with biases, one a problem, for each penalty.

    They minimise the mean cross entropy plus the penalty times the squared weights; biases cost
    nothing. A label without an example gets no more than a millionth of any prediction.

    Args:
        features: Features of shape ``(P, B, d)``, in float64.
        labels: Label indices of shape ``(B,)``.
        n_labels: ``C``.
        penalties: Each above 0; quickest from the largest down.

    Yields:
        Weights of shape ``(P, C, d)`` and biases of shape ``(P, C)``.
    """
    n_problems, n_examples, width = features.shape
    seen, targets = labels.unique(return_inverse=True)
    centre = features.mean(1, keepdim=True)  # (P, 1, d)
    inputs, directions = rotate(features - centre)
    # A bias is the weight of an input that is 1, and centred features are at right angles to it.
    inputs = torch.cat([inputs, inputs.new_ones(n_problems, n_examples, 1)], -1)
    costs = inputs.new_tensor(penalties).outer(inputs.new_ones(inputs.shape[-1]))
    costs[:, -1] = 0.0
    offsets = inputs.new_zeros(n_problems, n_examples, len(seen))
    for fitted in fit_path(inputs, targets, offsets=offsets, penalties=costs):
        weights = features.new_zeros(n_problems, n_labels, width)
        weights[:, seen] = fitted[..., :-1] @ directions
        biases = features.new_full((n_problems, n_labels), _UNSEEN_BIAS)
        biases[:, seen] = fitted[..., -1] - fitted[..., -1].mean(-1, keepdim=True)
        yield weights, biases - (weights @ centre.mT).squeeze(-1)


def rotate(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features along their own singular directions.

    Real features have a few strong directions and many weak ones; along these the solver takes
    each at its own pace. Penalised weights lie in the span of the features, so nothing is lost.

    Args:
        features: Features of shape ``(P, B, d)``.

    Returns:
        ``inputs`` of shape ``(P, B, r)`` and ``directions`` of shape ``(P, r, d)``.
    """
    directions = torch.linalg.svd(features, full_matrices=False).Vh
    return features @ directions.mT, directions


def fit_path(
    inputs: Tensor, labels: Tensor, *, offsets: Tensor, penalties: Tensor
) -> Iterator[Tensor]:
    """The minimum for each penalty, looked for from where the one before was found.

    Args:
        inputs: As in ``minimise``.
        labels: As in ``minimise``.
        offsets: As in ``minimise``.
        penalties: Penalties of shape ``(K, r)``; quickest from the largest down.

    Yields:
        ``K`` weights of shape ``(P, C, r)``.
    """
    n_problems, _, n_labels = offsets.shape
    weights = inputs.new_zeros(n_problems, n_labels, inputs.shape[-1])
    for penalty in penalties:
        weights = minimise(inputs, labels, offsets=offsets, penalties=penalty, initial=weights)
        yield weights


def minimise(
    inputs: Tensor, labels: Tensor, *, offsets: Tensor, penalties: Tensor, initial: Tensor
) -> Tensor:
    """The weights with the lowest penalised cross entropy, one minimum a problem.

    They minimise the mean cross entropy of ``inputs @ weights.mT + offsets`` plus
    ``(penalties * weights**2).sum()`` by L-BFGS in float64. The fit ends where no scaled slope is
    above 1e-6, so it depends on its arguments and hardly on the machine.

    Args:
        inputs: Inputs of shape ``(P, B, r)``.
        labels: Label indices of shape ``(B,)``.
        offsets: Logits at zero weights, of shape ``(P, B, C)``.
        penalties: What a squared weight costs in each direction, of shape ``(r,)``.
        initial: Where the search starts, of shape ``(P, C, r)``. The minimum does not depend on
            it.
    """
    n_examples = inputs.shape[1]
    targets = F.one_hot(labels, offsets.shape[-1]).to(inputs) / n_examples  # (B, C)
    probs = (inputs @ initial.mT + offsets).softmax(-1)
    curvature = (probs * (1 - probs)).clamp(min=_LEAST_CURVATURE).mT @ inputs.square()  # (P, C, r)
    # In steps of these lengths all directions are about equally steep.
    steps = (curvature / n_examples + 2 * penalties).rsqrt()
    position = initial / steps
    optimizer = torch.optim.LBFGS(
        [position],
        max_iter=_MAX_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        history_size=_N_REMEMBERED,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        """The sum over problems: they share no weight, so its minimum is each one's minimum."""
        weights = position * steps
        log_probs = (inputs @ weights.mT + offsets).log_softmax(-1)  # (P, B, C)
        residuals = log_probs.exp() / n_examples - targets
        # Written out: autograd would take most of the time of a small problem.
        position.grad = steps * (residuals.mT @ inputs + 2 * penalties * weights)
        return (penalties * weights.square()).sum() - (targets * log_probs).sum()

    optimizer.step(objective)
    return position * steps
