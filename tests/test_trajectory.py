from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import DriftWord
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst import Trajectory
from optuna_llm_catalyst import TrajectoryPoint
from optuna_llm_catalyst.trajectory import best_swaps


FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANY_FLOAT = st.floats()
POSITIONS = st.integers(0, 20)


def swaps(floats: st.SearchStrategy[float]) -> st.SearchStrategy[Swap]:
    return st.builds(Swap, POSITIONS, st.text(), st.text(), floats, measured=st.none() | floats)


def points(floats: st.SearchStrategy[float]) -> st.SearchStrategy[TrajectoryPoint]:
    return st.builds(
        TrajectoryPoint,
        step=st.just(0),
        words=st.lists(st.text(), max_size=3).map(tuple),
        loss=floats,
        accuracy=st.none() | floats,
        hard_loss=st.none() | floats,
        token_ids=st.lists(st.integers(0, 40_000), max_size=3).map(tuple),
        drift=st.lists(st.builds(DriftWord, POSITIONS, st.text(), floats), max_size=2).map(tuple),
        swaps=st.lists(swaps(floats), max_size=2).map(tuple),
    )


@st.composite
def trajectories(
    draw: st.DrawFn, floats: st.SearchStrategy[float] = ANY_FLOAT, max_size: int = 4
) -> Trajectory:
    drawn = draw(st.lists(points(floats), max_size=max_size))
    steps = sorted(draw(st.sets(st.integers(0, 10_000), min_size=len(drawn))))
    return Trajectory(
        tuple(
            TrajectoryPoint(**{**vars(point), "step": step})
            for point, step in zip(drawn, steps, strict=False)
        )
    )


def of_losses(*losses: float) -> Trajectory:
    return Trajectory(tuple(TrajectoryPoint(i, (), loss) for i, loss in enumerate(losses)))


@given(st.lists(ANY_FLOAT, max_size=60), st.integers(3, 15))
def test_thinning_keeps_the_first_the_best_and_the_last(losses: list[float], limit: int) -> None:
    full = of_losses(*losses)
    thin = full.thinned(limit)
    assert len(thin.points) <= limit
    assert set(thin.points) <= set(full.points)
    if full.points:
        assert thin.points[0] is full.points[0]
        assert thin.points[-1] is full.points[-1]
    assert thin.best is full.best
    assert thin.thinned(limit) == thin


@given(st.integers(0, 60), st.integers(3, 15))
def test_thinning_spreads_evenly(n: int, limit: int) -> None:
    kept = [point.step for point in of_losses(*[1.0] * n).thinned(limit).points]
    gaps = [later - earlier for earlier, later in zip(kept, kept[1:], strict=False)]
    assert max(gaps, default=0) <= math.ceil((n - 1) / (limit - 2)) + 1
    assert n > limit or len(kept) == n


@given(st.lists(ANY_FLOAT, max_size=10))
def test_the_best_point_is_the_first_of_lowest_loss(losses: list[float]) -> None:
    finite = [(loss, step) for step, loss in enumerate(losses) if math.isfinite(loss)]
    best = of_losses(*losses).best
    assert best == (of_losses(*losses).points[min(finite)[1]] if finite else None)


@pytest.mark.parametrize("steps", [(0, 0), (1, 0), (0, 2, 1)])
def test_steps_must_rise(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`points` must have rising steps, got \[\d"):
        Trajectory(tuple(TrajectoryPoint(step, (), 1.0) for step in steps))


@pytest.mark.parametrize("limit", [2, 0, -1])
def test_a_limit_without_room_for_three_points_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"`limit` must be at least 3, got {limit}"):
        of_losses(1.0).thinned(limit)


def test_the_text_of_a_point_is_its_words() -> None:
    assert TrajectoryPoint(0, ("calm", "answer"), 1.0).text == "calm answer"


@given(st.lists(points(FINITE), max_size=5))
def test_best_swaps_are_those_that_helped_best_first(drawn: list[TrajectoryPoint]) -> None:
    best = best_swaps(drawn)
    measured = [swap.measured for swap in best if swap.measured is not None]
    assert len(measured) == len(best)
    assert measured == sorted(measured)
    assert all(change < 0 for change in measured)
    helpful = {
        (swap.position, swap.new)
        for point in drawn
        for swap in point.swaps
        if swap.measured is not None and swap.measured < 0
    }
    assert {(swap.position, swap.new) for swap in best} == helpful
    assert len(best) == len(helpful)


def test_a_swap_that_was_measured_twice_counts_as_measured_last() -> None:
    first, last = (Swap(0, "calm", "quiet", -1.0, measured) for measured in (-0.9, -0.1))
    drawn = [TrajectoryPoint(i, (), 1.0, swaps=(s,)) for i, s in enumerate((first, last))]
    assert best_swaps(drawn) == (last,)
