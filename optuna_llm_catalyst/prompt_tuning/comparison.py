"""A study's product beside its baselines, on the same test examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from numpy.typing import ArrayLike

from optuna_llm_catalyst.prompt_tuning.significance import accuracy
from optuna_llm_catalyst.prompt_tuning.significance import Interval
from optuna_llm_catalyst.prompt_tuning.significance import Metric
from optuna_llm_catalyst.prompt_tuning.significance import metric_interval
from optuna_llm_catalyst.prompt_tuning.significance import paired_interval
from optuna_llm_catalyst.prompt_tuning.significance import words


@dataclass(frozen=True)
class Row:
    """One row of a report.

    Attributes:
        name: What made the predictions.
        score: Its score on the test examples, with a 95 % interval.
        difference: The product's score minus this row's, with a 95 % interval; None in the
            product's own row.
        verdict: What the difference says of the product, in words; empty in the product's own row.
    """

    name: str
    score: Interval
    difference: Interval | None
    verdict: str


def compare(
    labels: ArrayLike,
    predictions: Mapping[str, ArrayLike],
    product: str,
    metric: Metric = accuracy,
    *,
    seed: int = 0,
    n_resamples: int = 2000,
) -> list[Row]:
    """The rows of a report, in the order of the predictions.

    Args:
        labels: The true labels of the test examples, of shape ``(n,)``.
        predictions: Predicted labels of the same examples, by name.
        product: The name that is compared with all others.
        metric: The score; higher is better.
        seed: Of the bootstrap's samples.
        n_resamples: How many samples are drawn.

    Raises:
        ValueError: If there are no predictions of that name, the lengths differ, or there is no
            example.
    """
    if product not in predictions:
        raise ValueError(f"`product` must be one of {sorted(predictions)}, got {product!r}.")

    def row(name: str) -> Row:
        theirs, options = predictions[name], {"seed": seed, "n_resamples": n_resamples}
        score = metric_interval(metric, labels, theirs, **options)
        if name == product:
            return Row(name, score, None, "")
        lead = paired_interval(metric, labels, predictions[product], theirs, **options)
        return Row(name, score, lead, words(lead))

    return [row(name) for name in predictions]
