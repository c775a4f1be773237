"""A linear readout of frozen features, fitted towards the one that a study left.

================  =======  ================================================================
notation          shape    meaning
================  =======  ================================================================
``features``, X   (n, d)   features of unit norm, on any device
``labels``, y     (n,)     label indices; a split need not have all labels
``weights``, W    (C, d)   one vector a label
``bias``, b       (C,)     added to a label's logits
``start``         (C, d)   the weights to which a fit is pulled
================  =======  ================================================================

A readout gives ``log_softmax(scale * X @ W.T + b)``. The fit minimises the mean cross entropy plus
``pull * (((W - start) ** 2).sum() + ((b / scale) ** 2).sum())``: a penalty towards a start that is
known to be good, as L2-SP (arXiv 1802.01483) has it. The bias is the weight of one more feature
that is always 1, and starts at 0. With few examples a fit that is pulled to 0, such as the linear
probe, has to find again what the start already knows. All fits are in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.logistic import fit_path
from optuna_llm_catalyst.prompt_tuning.logistic import logistic_regressions
from optuna_llm_catalyst.prompt_tuning.logistic import rotate


#: Features of shape (n, d) and label indices of shape (n,).
Data = tuple[Tensor, Tensor]

SCALES = (10.0, 20.0, 50.0)
PULLS = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 3))
INVERSE_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-2, 7))


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear classifier on features.

    Attributes:
        weights: One vector a label, of shape ``(C, d)``.
        scale: Multiplies the products of features and weights.
        bias: Added to them, of shape ``(C,)``.
    """

    weights: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Readout:
        """The same on another device or in another number format."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return Readout(self.weights.to(device, dtype), self.scale, bias)

    def log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities of shape ``(n, C)`` for features of shape ``(n, d)``."""
        logits = self.scale * features @ self.weights.T
        return (logits if self.bias is None else logits + self.bias).log_softmax(-1)


@dataclass(frozen=True)
class Fit:
    """How to fit, as chosen by the validation split.

    Attributes:
        scale: The readout's scale.
        pull: How strongly it is pulled to the start; infinity: its weights are the start's.
        accuracy: Its accuracy there, in [0, 1], fitted on the training split.
        loss: Its mean cross entropy there.
    """

    scale: float
    pull: float
    accuracy: float
    loss: float


@dataclass(frozen=True, eq=False)
class FittedReadout:
    """A readout, and how it was fitted."""

    readout: Readout
    fit: Fit


def fit_towards(
    features: Tensor, labels: Tensor, start: Tensor, *, scale: float, pull: float
) -> Readout:
    """The readout with the lowest mean cross entropy plus penalty, see above.

    The problem is strictly convex: there is one minimum, wherever the search starts.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)``.
        start: ``(C, d)``.
        scale: Of the logits, above 0.
        pull: Above 0; infinity gives the start.

    Returns:
        A readout in float32, on the features' device. It has a bias unless the pull is infinite.

    Raises:
        ValueError: If shapes do not match, a number is out of range, or there is no example.
    """
    towards = _checked_start(start)
    data = _checked((features, labels), "training", *towards.shape)
    fitted = Readout(towards, scale)
    if pull != inf:
        ((_, fitted),) = _fits(data, towards, (scale,), (pull,))
    return fitted.to(features.device, torch.float32)


def choose_fit(
    train: Data,
    validation: Data,
    start: Readout,
    *,
    scales: Sequence[float] = SCALES,
    pulls: Sequence[float] = PULLS,
) -> Fit:
    """The scale and pull whose fit on the training split is best on the validation split.

    The highest accuracy wins, of equal ones the lowest loss, then the stronger pull: chosen by
    the loss alone, fits were a point of test accuracy worse where it was measured
    (benchmarks/README.md). The start itself is among the candidates, at its own scale and at each
    of ``scales``, with an infinite pull.

    Args:
        train: Features and labels to fit.
        validation: Features and labels to choose by.
        start: The readout to which the fits are pulled.
        scales: Scales to try, each above 0.
        pulls: Pulls to try, each above 0.

    Raises:
        ValueError: As ``fit_towards``.
    """
    if start.bias is not None:
        raise ValueError("`start` must be a readout without a bias: a fit's bias starts at 0.")
    towards = _checked_start(start.weights)
    train = _checked(train, "training", *towards.shape)
    features, labels = _checked(validation, "validation", *towards.shape)
    candidates = [
        *((inf, Readout(towards, scale)) for scale in (start.scale, *scales)),
        *_fits(train, towards, scales, pulls),
    ]
    fits = []
    for pull, readout in candidates:
        log_probs = readout.log_probs(features)  # (n, C)
        accuracy = (log_probs.argmax(-1) == labels).double().mean().item()
        fits.append(Fit(readout.scale, pull, accuracy, F.nll_loss(log_probs, labels).item()))
    return min(fits, key=lambda fit: (-fit.accuracy, fit.loss, -fit.pull))


def fit_readout(
    train: Data,
    validation: Data,
    start: Readout,
    *,
    refit: bool = True,
    scales: Sequence[float] = SCALES,
    pulls: Sequence[float] = PULLS,
) -> FittedReadout:
    """A readout fitted as the validation split says, then once more on both splits.

    Args:
        train: Features and labels to fit.
        validation: Features and labels to choose scale and pull by.
        start: The readout to which the fit is pulled, and the result where no fit is better.
        refit: Whether to fit on both splits at the end, with the same scale and pull. The
            validation split then has no more to say about the result.
        scales: Scales to try, each above 0.
        pulls: Pulls to try, each above 0.

    Raises:
        ValueError: As ``fit_towards``.
    """
    fit = choose_fit(train, validation, start, scales=scales, pulls=pulls)
    features, labels = _joined(train, validation) if refit else train
    readout = fit_towards(features, labels, start.weights, scale=fit.scale, pull=fit.pull)
    return FittedReadout(readout, fit)


def linear_probe(
    train: Data,
    validation: Data,
    n_labels: int,
    *,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
) -> Readout:
    """Logistic regression on the features alone: what a fit without a study is worth.

    It is scikit-learn's ``LogisticRegression``, its ``C`` chosen by validation accuracy (of equal
    ones the smaller ``C``) on the training split, then fitted on both splits.

    Args:
        train: Features and labels to fit.
        validation: Features and labels to choose by.
        n_labels: ``C`` of the shapes. A label without an example is never predicted.
        inverse_strengths: Values of scikit-learn's ``C`` to try, each above 0.

    Raises:
        ValueError: As ``fit_towards``.
    """
    device, width = train[0].device, train[0].shape[-1]
    train = _checked(train, "training", n_labels, width)
    features, labels = _checked(validation, "validation", n_labels, width)
    _check_positive("inverse_strengths", inverse_strengths)
    tried = sorted(inverse_strengths)
    accuracies = [
        (probe.log_probs(features).argmax(-1) == labels).sum().item()
        for probe in _probes(train, n_labels, tried)
    ]
    best = tried[accuracies.index(max(accuracies))]
    (probe,) = _probes(_joined(train, (features, labels)), n_labels, [best])
    return probe.to(device, torch.float32)


def _fits(
    data: Data, start: Tensor, scales: Sequence[float], pulls: Sequence[float]
) -> Iterator[tuple[float, Readout]]:
    """Pull and readout of each fit, in float64."""
    _check_positive("scales", scales)
    _check_positive("pulls", pulls)
    features, labels = data
    ones = torch.ones_like(features[:, :1])
    inputs, directions = rotate(torch.cat([features, ones], 1)[None])  # (1, n, r), (1, r, d + 1)
    pulls = sorted(pulls, reverse=True)
    for scale in scales:
        # The fit is in scale * (W - start), and b: its logits at 0 are the start's.
        offsets = scale * (features @ start.T).unsqueeze(0)  # (1, n, C)
        penalties = features.new_tensor(pulls).unsqueeze(1) / scale**2  # (K, 1)
        path = fit_path(inputs, labels, offsets=offsets, penalties=penalties)
        for pull, moved in zip(pulls, path, strict=True):
            weights, bias = (moved @ directions)[0].split([start.shape[1], 1], 1)
            yield pull, Readout(start + weights / scale, scale, bias.squeeze(1))


def _probes(data: Data, n_labels: int, inverse_strengths: Sequence[float]) -> Iterator[Readout]:
    """One probe in float64 for each value of scikit-learn's ``C``."""
    features, labels = data
    # Two labels have one vector in scikit-learn, ours have two of half its length.
    share = 1.0 if len(labels.unique()) == 2 else 0.5
    penalties = [share / (c * len(labels)) for c in inverse_strengths]
    for weights, biases in logistic_regressions(features[None], labels, n_labels, penalties):
        yield Readout(weights[0], bias=biases[0])


def _joined(train: Data, validation: Data) -> Data:
    return torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])


def _checked_start(start: Tensor) -> Tensor:
    """The start in float64 on the CPU, if it can be fitted towards."""
    if start.dim() != 2 or not start.isfinite().all():
        raise ValueError(
            f"The start must be finite weights (C, d), got {start.dtype} of shape "
            f"{tuple(start.shape)}, finite: {bool(start.isfinite().all())}."
        )
    return _double(start)


def _checked(data: Data, split: str, n_labels: int, width: int) -> Data:
    """Features in float64 and labels, both on the CPU, if they can be fitted."""
    features, labels = _double(data[0]), data[1].detach().cpu()
    if features.shape[1:] != (width,) or labels.shape != features.shape[:1]:
        raise ValueError(
            f"The {split} features must be (n, {width}) and their labels (n,), got shapes "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not len(labels):
        raise ValueError(f"The {split} split has no example: give it one or more.")
    if not features.isfinite().all():
        raise ValueError(f"The {split} features must be finite: some are infinite or NaN.")
    if labels.min() < 0 or labels.max() >= n_labels:
        raise ValueError(
            f"The {split} labels must be indices from 0 to {n_labels - 1}, got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    return features, labels


def _check_positive(name: str, values: Sequence[float]) -> None:
    if not values or not all(0 < value < inf for value in values):
        raise ValueError(f"`{name}` must be numbers above 0, got {tuple(values)}.")


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
