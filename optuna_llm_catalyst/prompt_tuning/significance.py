"""How far a score on test examples would move with other test examples: the bootstrap.

Test examples are drawn again with replacement, as many as there are, and the score is taken on
each such sample; the middle 95 % of these scores are the interval (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 13: the percentile interval). Two classifiers are
compared on the same samples, so what is hard for both does not count as a difference. The interval
says nothing about other training examples or seeds.

Scores are in the metric's own unit: 0 to 1 for an accuracy. Equal examples are counted together,
so an interval depends on the seed and not on the order of the examples.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_llm_catalyst.exceptions import check_at_least


#: A score of labels and predictions, both of shape (n,); higher is better.
Metric = Callable[[NDArray[Any], NDArray[Any]], float]

#: How many counts are held at once.
_MAX_COUNTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A score, and where it would lie with other test examples.

    Attributes:
        value: The score on the test examples.
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float
    low: float
    high: float


def accuracy(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """The share of examples with the right prediction."""
    return float((labels == predictions).mean())


def macro_f1(labels: NDArray[Any], predictions: NDArray[Any]) -> float:
    """The mean over the labels of the harmonic mean of precision and recall.

    Labels that are neither true nor predicted anywhere do not count. Label indices are much
    quicker than names.
    """
    if labels.dtype.kind not in "iu":
        _, indices = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
        labels, predictions = indices[: len(labels)], indices[len(labels) :]
    n = 1 + max(labels.max(), predictions.max())
    n_right = np.bincount(labels[labels == predictions], minlength=n)
    n_named = np.bincount(labels, minlength=n) + np.bincount(predictions, minlength=n)
    named = n_named > 0
    return float((2 * n_right[named] / n_named[named]).mean())


def interval(
    correct: ArrayLike, *, seed: int = 0, n_resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The interval of an accuracy, or of any mean over examples.

    Where all examples agree, the interval is a point: the bootstrap knows of no others.

    Args:
        correct: Whether each prediction is right, of shape ``(n,)``.
        seed: Of the samples.
        n_resamples: How many samples are drawn.
        level: How much of them the interval holds.

    Raises:
        ValueError: If there is no example, or a number is out of range.
    """
    (values,) = _examples(correct)
    distinct, frequencies = np.unique(values.astype(float), return_counts=True)
    means = [counts @ distinct / len(values) for counts in _counts(frequencies, seed, n_resamples)]
    return _middle(float(values.mean()), np.concatenate(means), level)


def difference(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    *,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The interval of one accuracy minus another on the same examples.

    Args:
        correct_a: Whether each prediction of the one is right, of shape ``(n,)``.
        correct_b: The same of the other.
        seed: As in ``interval``.
        n_resamples: As in ``interval``.
        level: As in ``interval``.

    Raises:
        ValueError: If the lengths differ; as ``interval``.
    """
    a, b = _examples(correct_a, correct_b)
    return interval(
        a.astype(float) - b.astype(float), seed=seed, n_resamples=n_resamples, level=level
    )


def metric_interval(
    metric: Metric,
    labels: ArrayLike,
    predictions: ArrayLike,
    *,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The interval of any score of predictions.

    Args:
        metric: The score; called once a sample.
        labels: The true labels, of shape ``(n,)``.
        predictions: The predicted ones.
        seed: As in ``interval``.
        n_resamples: As in ``interval``.
        level: As in ``interval``.

    Raises:
        ValueError: As ``difference``.
    """
    rows = _examples(labels, predictions)
    scores = [metric(*sample) for sample in _samples(rows, seed, n_resamples)]
    return _middle(metric(*rows), np.array(scores), level)


def paired_interval(
    metric: Metric,
    labels: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The interval of the score of predictions ``a`` minus that of ``b`` on the same examples.

    Args:
        metric: The score; called twice a sample.
        labels: The true labels, of shape ``(n,)``.
        a: The predictions of the one.
        b: The predictions of the other.
        seed: As in ``interval``.
        n_resamples: As in ``interval``.
        level: As in ``interval``.

    Raises:
        ValueError: As ``difference``.
    """
    rows = _examples(labels, a, b)

    def lead(labels: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> float:
        return metric(labels, a) - metric(labels, b)

    leads = [lead(*sample) for sample in _samples(rows, seed, n_resamples)]
    return _middle(lead(*rows), np.array(leads), level)


def words(difference: Interval) -> str:
    """What an interval of a difference says."""
    if difference.low > 0:
        return "higher by more than noise"
    if difference.high < 0:
        return "lower by more than noise"
    return "within noise"


def _examples(*rows: ArrayLike) -> tuple[NDArray[Any], ...]:
    """Arrays of one value an example, all of the same examples."""
    arrays = tuple(np.asarray(row) for row in rows)
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].ndim != 1:
        raise ValueError(
            f"One value an example is needed, of the same examples each; got the shapes {shapes}."
        )
    if not len(arrays[0]):
        raise ValueError("There is no example to draw from: at least one is needed.")
    return arrays


def _samples(
    rows: tuple[NDArray[Any], ...], seed: int, n_resamples: int
) -> Iterator[tuple[NDArray[Any], ...]]:
    """Samples of examples, each as rows like the given ones."""
    coded = [np.unique(row, return_inverse=True) for row in rows]
    cells, frequencies = np.unique([codes for _, codes in coded], axis=1, return_counts=True)
    values = [names[codes] for (names, _), codes in zip(coded, cells, strict=True)]
    for counts in _counts(frequencies, seed, n_resamples):
        for count in counts:
            yield tuple(np.repeat(row, count) for row in values)


def _counts(
    frequencies: NDArray[np.int64], seed: int, n_resamples: int
) -> Iterator[NDArray[np.int64]]:
    """How often each distinct example is drawn, a row a sample, some samples at a time."""
    check_at_least(1, n_resamples=n_resamples)
    rng = np.random.default_rng(seed)
    n_examples = int(frequencies.sum())
    at_once = max(1, _MAX_COUNTS // len(frequencies))
    for start in range(0, n_resamples, at_once):
        size = min(at_once, n_resamples - start)
        yield rng.multinomial(n_examples, frequencies / n_examples, size=size)


def _middle(value: float, scores: NDArray[np.float64], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
