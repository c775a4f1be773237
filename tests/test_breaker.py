from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import breaker
from optuna_llm_catalyst.history import PastProposal


LONGEST_PAUSE = 32


def asks_of(outcomes: str, *, start: int = 1) -> list[PastProposal]:
    """Asks of one trial after the other: ``x`` failed, ``v`` succeeded, ``?`` is open."""
    meaning = {"x": False, "v": True, "?": None}
    return [
        PastProposal(number, meaning[outcome]) for number, outcome in enumerate(outcomes, start)
    ]


ASKS = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([True, False, False, False, None])), max_size=20
).map(
    lambda steps: [
        PastProposal(sum(gap for gap, _ in steps[: i + 1]), outcome)
        for i, (_, outcome) in enumerate(steps)
    ]
)


def simulated(n_trials: int, answers: Callable[[int], bool]) -> list[PastProposal]:
    """What a study of one worker proposals, if the LLM answers by a function of the trial."""
    proposals: list[PastProposal] = []
    for number in range(n_trials):
        if not breaker.is_open(proposals, number):
            proposals.append(PastProposal(number, answers(number)))
    return proposals


@given(ASKS)
def test_failures_are_counted_from_the_end(
    proposals: list[PastProposal],
) -> None:
    closed = [ask.succeeded for ask in proposals if ask.succeeded is not None]
    expected = len(list(takewhile(lambda succeeded: not succeeded, reversed(closed))))
    assert breaker.n_failures(proposals) == expected


@given(ASKS, st.integers(1, 200))
def test_a_success_closes_it_whatever_was_before(
    proposals: list[PastProposal], later: int
) -> None:
    last = proposals[-1].trial_number if proposals else 0
    after = [*proposals, PastProposal(last + 1, True)]
    assert breaker.n_failures(after) == 0
    assert not breaker.is_open(after, last + 1 + later)
    assert breaker.transition(after, failed=True) == ""
    assert breaker.transition(after, failed=False) == ""


@given(ASKS, st.integers(0, 1000))
def test_below_the_threshold_it_is_never_open(proposals: list[PastProposal], number: int) -> None:
    if breaker.is_open(proposals, number):
        assert breaker.n_failures(proposals) >= breaker.THRESHOLD


@given(ASKS)
def test_a_pause_is_one_stretch_of_trials(
    proposals: list[PastProposal],
) -> None:
    last = proposals[-1].trial_number if proposals else 0
    is_open = [breaker.is_open(proposals, last + i) for i in range(1, LONGEST_PAUSE + 10)]
    pause = sum(is_open)
    assert is_open == [True] * pause + [False] * (len(is_open) - pause)
    assert pause in (0, 2, 4, 8, 16, 32)


@given(ASKS)
def test_one_more_failure_never_shortens_the_pause(proposals: list[PastProposal]) -> None:
    last = proposals[-1].trial_number if proposals else 0
    more = [*proposals, PastProposal(last + 1, False)]
    for i in range(1, LONGEST_PAUSE + 10):
        assert breaker.is_open(more, last + 1 + i) >= breaker.is_open(proposals, last + i)


@given(ASKS)
def test_an_open_ask_blocks_others_for_its_pause_only(proposals: list[PastProposal]) -> None:
    last = proposals[-1].trial_number if proposals else 0
    probing = [*proposals, PastProposal(last + 1, None)]
    for i in range(1, LONGEST_PAUSE + 10):
        # As if the last that failed had asked there.
        assert breaker.is_open(probing, last + 1 + i) == breaker.is_open(proposals, last + i)
    assert not breaker.is_open(probing, last + 2 + LONGEST_PAUSE)


@given(ASKS, st.booleans())
def test_a_transition_is_the_difference_that_an_answer_makes(
    proposals: list[PastProposal], failed: bool
) -> None:
    last = proposals[-1].trial_number if proposals else 0
    before = breaker.n_failures(proposals) >= breaker.THRESHOLD
    after = (
        breaker.n_failures([*proposals, PastProposal(last + 1, not failed)]) >= breaker.THRESHOLD
    )
    expected = {
        (False, False): "",
        (False, True): "opened",
        (True, True): "still open",
        (True, False): "closed",
    }
    assert breaker.transition(proposals, failed=failed) == expected[before, after]


@given(st.lists(st.booleans(), max_size=200))
def test_it_opens_and_closes_in_turns(answers: list[bool]) -> None:
    proposals = simulated(len(answers), answers.__getitem__)
    turns = [
        transition
        for i, ask in enumerate(proposals)
        if (transition := breaker.transition(proposals[:i], failed=not ask.succeeded))
        in ("opened", "closed")
    ]
    assert turns == ["opened", "closed"] * (len(turns) // 2) + ["opened"] * (len(turns) % 2)


@given(st.integers(0, 1000), st.integers(1, 200))
def test_an_llm_that_comes_back_is_found_within_33_trials(down: int, up: int) -> None:
    proposals = simulated(down + up, lambda number: number >= down)
    found = [ask.trial_number for ask in proposals if ask.succeeded]
    if up > LONGEST_PAUSE:
        assert found[0] <= down + LONGEST_PAUSE
    # From then on every trial proposals.
    assert found == list(range(found[0], down + up)) if found else up <= LONGEST_PAUSE


@given(st.integers(0, 2000))
def test_an_llm_that_always_fails_is_asked_ever_more_rarely(n_trials: int) -> None:
    """At first as often as a logarithm grows, then in one trial of 33."""
    asking = [ask.trial_number for ask in simulated(n_trials, lambda _: False)]
    doubling = [0, 1, 2, 5, 10, 19, 36]
    assert asking == [
        number
        for number in range(n_trials)
        if number in doubling or (number > 36 and (number - 36) % (LONGEST_PAUSE + 1) == 0)
    ]


@pytest.mark.parametrize(
    ("outcomes", "pause"),
    [
        ("", 0),
        ("x", 0),
        ("xx", 0),
        ("xxx", 2),
        ("xxxx", 4),
        ("xxxxx", 8),
        ("xxxxxx", 16),
        ("xxxxxxx", 32),
        ("x" * 8, 32),
        ("x" * 10_000, 32),
        ("v", 0),
        ("xxxv", 0),
        ("xxvx", 0),
        ("xxvxx", 0),
        ("vxxx", 2),
        ("?", 0),
        ("xx?", 0),
        ("xx??", 0),
        ("xxx?", 2),
        ("?xxx", 2),
        ("x?x?x", 2),
        ("xxxx??", 4),
        ("xxxv?", 0),
    ],
)
def test_so_many_trials_do_without_asking(outcomes: str, pause: int) -> None:
    proposals: Sequence[PastProposal] = asks_of(outcomes)
    last = len(outcomes)
    seen = [breaker.is_open(proposals, last + 1 + i) for i in range(40)]
    assert seen == [True] * pause + [False] * (40 - pause)


@pytest.mark.parametrize(
    ("outcomes", "when_it_fails", "when_it_succeeds"),
    [
        ("", "", ""),
        ("x", "", ""),
        ("xx", "opened", ""),
        ("xxx", "still open", "closed"),
        ("xxxx", "still open", "closed"),
        ("xxxv", "", ""),
        ("xx?", "opened", ""),
        ("xxx??", "still open", "closed"),
    ],
)
def test_an_answer_changes_it(outcomes: str, when_it_fails: str, when_it_succeeds: str) -> None:
    proposals = asks_of(outcomes)
    assert breaker.transition(proposals, failed=True) == when_it_fails
    assert breaker.transition(proposals, failed=False) == when_it_succeeds
