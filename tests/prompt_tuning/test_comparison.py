"""A report's rows say what the bootstrap says, of each row against the product."""

from __future__ import annotations

import numpy as np
import pytest

from optuna_llm_catalyst.prompt_tuning.comparison import compare
from optuna_llm_catalyst.prompt_tuning.significance import accuracy
from optuna_llm_catalyst.prompt_tuning.significance import macro_f1
from optuna_llm_catalyst.prompt_tuning.significance import Metric
from optuna_llm_catalyst.prompt_tuning.significance import metric_interval
from optuna_llm_catalyst.prompt_tuning.significance import paired_interval


LABELS = np.arange(120) % 3
#: Predictions that are wrong on the first examples, and then right.
PREDICTIONS = {
    name: np.where(np.arange(120) < n_wrong, (LABELS + 1) % 3, LABELS)
    for name, n_wrong in {"probe": 60, "ensemble": 20, "one stage": 21, "oracle": 0}.items()
}


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_a_row_holds_what_its_two_intervals_are(metric: Metric) -> None:
    rows = compare(LABELS, PREDICTIONS, "ensemble", metric, seed=5, n_resamples=100)
    assert [row.name for row in rows] == list(PREDICTIONS)
    options = {"seed": 5, "n_resamples": 100}
    for row in rows:
        theirs = PREDICTIONS[row.name]
        assert row.score == metric_interval(metric, LABELS, theirs, **options)
        if row.name != "ensemble":
            ours = PREDICTIONS["ensemble"]
            assert row.difference == paired_interval(metric, LABELS, ours, theirs, **options)


def test_a_verdict_is_of_the_product() -> None:
    rows = {row.name: row for row in compare(LABELS, PREDICTIONS, "ensemble", n_resamples=200)}
    assert {name: row.verdict for name, row in rows.items()} == {
        "probe": "higher by more than noise",
        "ensemble": "",
        "one stage": "within noise",
        "oracle": "lower by more than noise",
    }
    assert rows["ensemble"].difference is None
    probe = rows["probe"].difference
    assert probe is not None
    assert probe.value == pytest.approx(40 / 120)


def test_the_rows_do_not_depend_on_each_other() -> None:
    few = {name: PREDICTIONS[name] for name in ("ensemble", "probe")}
    all_rows = {row.name: row for row in compare(LABELS, PREDICTIONS, "ensemble", n_resamples=50)}
    for row in compare(LABELS, few, "ensemble", n_resamples=50):
        assert row == all_rows[row.name]


def test_a_product_without_predictions_is_refused() -> None:
    with pytest.raises(ValueError, match="'fit'") as raised:
        compare(LABELS, PREDICTIONS, "fit")
    assert "one stage" in str(raised.value)


def test_predictions_of_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="same examples"):
        compare(LABELS, {"fit": LABELS, "probe": LABELS[1:]}, "fit")
