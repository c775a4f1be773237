"""What a study optimises: the loss, the accuracy, the macro-F1, or a measure of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import math
from typing import Literal

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.models import losses


#: From the label indices of examples, ``(n,)``, and either the log-probabilities of the labels,
#: ``(n, C)``, or the predicted label indices, ``(n,)``, to a value. All are on the CPU.
Measure = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Metric:
    """What a study optimises.

    Attributes:
        name: What it is called on screens and in records; stages of two names do not compare.
        maximize: Whether a higher value is better.
        measure: From label indices ``(n,)`` and log-probabilities ``(n, C)`` to a value; with
            :func:`of_predictions` from predicted label indices ``(n,)``.
    """

    name: str
    maximize: bool
    measure: Measure

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction of a study that optimises it."""
        return "maximize" if self.maximize else "minimize"

    def value(self, labels: Tensor, log_probs: Tensor) -> float:
        """The value of log-probabilities ``(n, C)``; NaN if one of them is not a number."""
        if log_probs.isnan().any():
            return math.nan
        return float(self.measure(labels.cpu(), log_probs.cpu()))

    def rank(self, value: float, loss: float) -> tuple[float, float]:
        """Sorts values from best to worst, equal ones by their loss.

        What is not a number comes last.
        """
        if math.isnan(value) or math.isnan(loss):
            return math.inf, math.inf
        return -value if self.maximize else value, loss


@dataclass(frozen=True)
class TestScore:
    """What a prompt is worth on the test split.

    Attributes:
        loss: Mean cross entropy in nats.
        accuracy: Accuracy in [0, 1].
        n_examples: How many examples the split has.
        value: The value by the objective's metric.
    """

    loss: float
    accuracy: float
    n_examples: int
    value: float

    __test__ = False  # Not a test case, whatever pytest thinks of the name.


def of_predictions(name: str, measure: Measure, *, maximize: bool = True) -> Metric:
    """A metric that is measured by predictions, as most of scikit-learn's are.

    Args:
        name: Its name.
        measure: From label indices ``(n,)`` and predicted ones ``(n,)`` to a value.
        maximize: Whether a higher value is better.
    """
    return Metric(name, maximize, partial(_by_predictions, measure))


def as_metric(metric: str | Metric | Measure) -> Metric:
    """A metric by its name, or of a measure of log-probabilities that is to be maximized.

    Raises:
        ValueError: If no metric has that name, or the measure has no name.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {metric!r}.")
        return METRICS[metric]
    name = getattr(metric, "__name__", "")
    if not name.isidentifier():
        raise ValueError(
            f"`metric` must have a name, by which a study knows it; {metric!r} has none: give "
            "Metric(name, maximize, measure)."
        )
    return Metric(name, True, metric)


def _by_predictions(measure: Measure, labels: Tensor, log_probs: Tensor) -> float:
    return measure(labels, log_probs.argmax(-1))


def _loss(labels: Tensor, log_probs: Tensor) -> float:
    return losses(log_probs.unsqueeze(0), labels).item()


def _accuracy(labels: Tensor, predictions: Tensor) -> float:
    return (predictions == labels).double().mean().item()


def _macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """The mean F1 of the labels that examples have or are given, as scikit-learn takes it."""
    n = int(torch.cat([labels, predictions]).max()) + 1
    given = labels.bincount(minlength=n) + predictions.bincount(minlength=n)
    right = labels[labels == predictions].bincount(minlength=n)
    is_seen = given > 0
    return (2 * right[is_seen].double() / given[is_seen]).mean().item()


LOSS = Metric("loss", False, _loss)
ACCURACY = of_predictions("accuracy", _accuracy)
MACRO_F1 = of_predictions("macro-f1", _macro_f1)
#: The metrics that can be given by name.
METRICS = {metric.name: metric for metric in (LOSS, ACCURACY, MACRO_F1)}
