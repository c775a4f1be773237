"""Bootstrap intervals: where they must be exact, and how often they hold what they promise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import nan

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from optuna_llm_catalyst.prompt_tuning import significance
from optuna_llm_catalyst.prompt_tuning.significance import accuracy
from optuna_llm_catalyst.prompt_tuning.significance import difference
from optuna_llm_catalyst.prompt_tuning.significance import Interval
from optuna_llm_catalyst.prompt_tuning.significance import interval
from optuna_llm_catalyst.prompt_tuning.significance import macro_f1
from optuna_llm_catalyst.prompt_tuning.significance import metric_interval
from optuna_llm_catalyst.prompt_tuning.significance import paired_interval
from optuna_llm_catalyst.prompt_tuning.significance import words


Ints = NDArray[np.int64]


def make_predictions(n: int, seed: int = 0) -> tuple[Ints, Ints, Ints]:
    """Labels, and two predictions of them of which the first is the better one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)

    def predict(share: float) -> Ints:
        return np.where(rng.random(n) < share, labels, rng.integers(3, size=n))

    return labels, predict(0.7), predict(0.4)


def ends(found: Interval) -> tuple[float, float]:
    return found.low, found.high


# Laws.


METRICS = pytest.mark.parametrize("metric", [accuracy, macro_f1])
LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=20)


@METRICS
@given(labels=LABELS, data=st.data())
def test_equal_predictions_differ_by_nothing_at_all(
    metric: significance.Metric, labels: list[int], data: st.DataObject
) -> None:
    n = len(labels)
    a = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    nothing = Interval(0.0, 0.0, 0.0)
    assert paired_interval(metric, labels, a, a, n_resamples=10) == nothing
    right = np.array(a) == labels
    assert difference(right, right, n_resamples=10) == nothing


@METRICS
def test_exchanging_the_two_turns_the_interval_around(metric: significance.Metric) -> None:
    """Up to the samples: they are drawn by the values, and those are exchanged as well."""
    labels, a, b = make_predictions(60)
    ab = paired_interval(metric, labels, a, b, n_resamples=4000)
    ba = paired_interval(metric, labels, b, a, n_resamples=4000)
    assert ab.value == -ba.value
    assert ends(ab) == pytest.approx((-ba.high, -ba.low), abs=0.02)
    right_a, right_b = a == labels, b == labels
    ab, ba = difference(right_a, right_b), difference(right_b, right_a)
    assert ab.value == -ba.value
    assert ends(ab) == pytest.approx((-ba.high, -ba.low), abs=0.02)


@METRICS
@given(seed=st.integers(0, 99))
def test_the_order_of_examples_changes_nothing(metric: significance.Metric, seed: int) -> None:
    labels, a, b = make_predictions(30)
    order = np.random.default_rng(seed).permutation(30)

    def intervals(labels: Ints, a: Ints, b: Ints) -> list[Interval]:
        options = {"seed": 3, "n_resamples": 20}
        return [
            interval(a == labels, **options),
            difference(a == labels, b == labels, **options),
            metric_interval(metric, labels, a, **options),
            paired_interval(metric, labels, a, b, **options),
        ]

    one, other = intervals(labels, a, b), intervals(labels[order], a[order], b[order])
    for left, right in zip(one, other, strict=True):
        assert left.value == pytest.approx(right.value, abs=1e-12)
        assert ends(left) == pytest.approx(ends(right), abs=1e-12)


@METRICS
def test_names_and_numbers_of_labels_give_the_same(metric: significance.Metric) -> None:
    rows = make_predictions(40)
    names = np.array(["apple", "bread", "cheese"])
    numbers = paired_interval(metric, *rows, n_resamples=50)
    assert paired_interval(metric, *(names[row] for row in rows), n_resamples=50) == numbers


def test_another_seed_draws_other_samples_and_the_same_seed_the_same() -> None:
    labels, a, _ = make_predictions(50)
    assert interval(a == labels, seed=1) == interval(a == labels, seed=1)
    drawn = {metric_interval(macro_f1, labels, a, seed=s, n_resamples=50).low for s in range(5)}
    assert len(drawn) > 1


def test_a_higher_level_and_fewer_examples_make_a_wider_interval() -> None:
    labels, a, _ = make_predictions(400)
    right = a == labels

    def width(found: Interval) -> float:
        return found.high - found.low

    widths = [width(interval(right, level=level)) for level in (0.5, 0.8, 0.95, 0.99)]
    assert widths == sorted(set(widths))
    assert width(interval(right[:100])) > 1.5 * width(interval(right))


@pytest.mark.parametrize("share", [0.5, 0.85])
def test_95_of_100_intervals_hold_the_true_accuracy(share: float) -> None:
    right = np.random.default_rng(0).random((400, 200)) < share
    found = [interval(row, seed=i, n_resamples=500) for i, row in enumerate(right)]
    assert 0.91 <= np.mean([i.low <= share <= i.high for i in found]) <= 0.985


@pytest.mark.parametrize("lead", [0.0, 0.1])
def test_95_of_100_intervals_hold_the_true_difference(lead: float) -> None:
    """Both find the same examples hard, as classifiers do."""
    rng = np.random.default_rng(1)
    hardness = rng.random((400, 200))
    noise = rng.normal(0, 0.2, (2, 400, 200))
    easy_a, easy_b = hardness + noise[0] < 0.6 + lead, hardness + noise[1] < 0.6
    truth = easy_a.mean() - easy_b.mean()
    found = [
        difference(a, b, seed=i, n_resamples=500)
        for i, (a, b) in enumerate(zip(easy_a, easy_b, strict=True))
    ]
    assert 0.91 <= np.mean([i.low <= truth <= i.high for i in found]) <= 0.985
    apart = difference(easy_a[0], rng.permutation(easy_b[0]))
    assert found[0].high - found[0].low < apart.high - apart.low


# Against the slow way, and against others.


@METRICS
def test_samples_are_what_drawing_examples_in_every_way_gives(
    metric: significance.Metric,
) -> None:
    """All 3125 samples of five examples, each as likely as another."""
    labels, a, b = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    leads = []
    for draw in product(range(5), repeat=5):
        rows = list(draw)
        leads.append(metric(labels[rows], a[rows]) - metric(labels[rows], b[rows]))
    found = paired_interval(metric, labels, a, b, n_resamples=20_000, level=0.6)
    assert found.value == pytest.approx(metric(labels, a) - metric(labels, b))
    # Scores of five examples are few: a quantile may lie on either side of its step.
    for end, share in zip(ends(found), (0.2, 0.8), strict=True):
        low, high = np.quantile(leads, [share - 0.02, share + 0.02])
        assert low - 1e-9 <= end <= high + 1e-9


def test_an_interval_is_scipys() -> None:
    labels, a, b = make_predictions(80)
    theirs = scipy.stats.bootstrap(
        ((a == labels).astype(float), (b == labels).astype(float)),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = [
        difference(a == labels, b == labels, n_resamples=20_000),
        paired_interval(accuracy, labels, a, b, n_resamples=20_000),
    ]
    for found in ours:
        # One example in 80 is the step from one score to the next.
        assert ends(found) == pytest.approx((theirs.low, theirs.high), abs=1.01 / 80)


@given(LABELS, st.data())
def test_macro_f1_is_scikit_learns(labels: list[int], data: st.DataObject) -> None:
    n = len(labels)
    predicted = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    expected = f1_score(labels, predicted, average="macro")
    assert macro_f1(np.array(labels), np.array(predicted)) == pytest.approx(expected)
    named = [np.array([f"label {i}" for i in row]) for row in (labels, predicted)]
    assert macro_f1(*named) == pytest.approx(expected)


def test_many_distinct_values_are_drawn_some_samples_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = interval(values, n_resamples=100)
    monkeypatch.setattr(significance, "_MAX_COUNTS", 330)
    assert ends(interval(values, n_resamples=100)) == pytest.approx(ends(whole), abs=1e-12)
    monkeypatch.setattr(significance, "_MAX_COUNTS", 1)
    assert ends(interval(values, n_resamples=100)) == pytest.approx(ends(whole), abs=1e-12)


# Words, and what is refused.


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.05, "higher by more than noise"),
        (-0.05, -0.01, "lower by more than noise"),
        (-0.01, 0.05, "within noise"),
        (0.0, 0.05, "within noise"),
        (-0.05, 0.0, "within noise"),
        (0.0, 0.0, "within noise"),
    ],
)
def test_what_an_interval_says(low: float, high: float, said: str) -> None:
    assert words(Interval((low + high) / 2, low, high)) == said


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no example": (lambda: interval([]), "no example"),
    "no example of two": (lambda: metric_interval(accuracy, [], []), "no example"),
    "other lengths": (lambda: difference([1, 0], [1]), "same examples"),
    "predictions too few": (lambda: paired_interval(accuracy, [1, 0], [1, 0], [1]), r"\(1,\)"),
    "a table": (lambda: interval([[1, 0]]), r"\(1, 2\)"),
    "no sample": (lambda: interval([1, 0], n_resamples=0), "`n_resamples`.*0"),
    "level of 0": (lambda: interval([1, 0], level=0), "`level`.*0"),
    "level in percent": (lambda: interval([1, 0], level=95), "`level`.*95"),
    "level that is no number": (lambda: interval([1, 0], level=nan), "`level`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
