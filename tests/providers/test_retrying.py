from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import random
from types import SimpleNamespace
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
import pytest
import tenacity
import tenacity.nap

from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import retrying


REQUEST = CompletionRequest("Write a prompt.", {"type": "object"}, seed=17, timeout=1000.0)
BUSY = ProviderError("busy", transient=True)
GONE = ProviderError("no such model")
DONE = Completion("calm", "test-1")


@dataclass
class Clock:
    """A clock that only sleeping and working move on."""

    now: float = 100.0
    pauses: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Flaky:
    """A provider of scripted outcomes, the last one for ever, each after some seconds."""

    name = "flaky:test"
    max_prompt_tokens = None

    def __init__(
        self, clock: Clock, outcomes: Iterable[Completion | BaseException], seconds: float = 0.0
    ) -> None:
        self.asked: list[CompletionRequest] = []
        self._clock = clock
        self._outcomes = list(outcomes)
        self._seconds = seconds

    def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        self._clock.now += self._seconds
        outcome = self._outcomes[min(len(self.asked), len(self._outcomes)) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def with_clock(work: Callable[[Clock], None]) -> Clock:
    """Runs something in a time of its own."""
    clock = Clock()
    fake = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    with (
        mock.patch.object(retrying, "time", fake),
        mock.patch.object(tenacity, "time", fake),
        mock.patch.object(tenacity.nap, "time", fake),
    ):
        work(clock)
    return clock


@pytest.mark.parametrize(
    ("outcomes", "max_tries", "n_tries", "message"),
    [
        ([DONE], 3, 1, None),
        ([BUSY, DONE], 3, 2, None),
        ([BUSY, BUSY, DONE], 3, 3, None),
        ([BUSY, BUSY, BUSY, DONE], 3, 3, "busy (tried 3 times)"),
        ([BUSY], 1, 1, "busy"),
        ([BUSY], 2, 2, "busy (tried 2 times)"),
        ([BUSY], 7, 7, "busy (tried 7 times)"),
        ([GONE], 3, 1, "no such model"),
        ([BUSY, GONE], 3, 2, "no such model (tried 2 times)"),
        ([GONE, DONE], 3, 1, "no such model"),
    ],
)
def test_only_transient_errors_are_tried_again(
    outcomes: list[Completion | BaseException], max_tries: int, n_tries: int, message: str | None
) -> None:
    def work(clock: Clock) -> None:
        provider = Flaky(clock, outcomes)
        if message is None:
            completion, counted = retrying.complete(
                provider, REQUEST, max_tries=max_tries, backoff=1.0
            )
            assert (completion, counted) == (DONE, n_tries)
        else:
            with pytest.raises(ProviderError) as caught:
                retrying.complete(provider, REQUEST, max_tries=max_tries, backoff=1.0)
            assert str(caught.value) == message
        assert len(provider.asked) == n_tries
        assert len(clock.pauses) == n_tries - 1

    with_clock(work)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("x"), KeyboardInterrupt()])
def test_other_errors_pass_through(error: BaseException) -> None:
    def work(clock: Clock) -> None:
        provider = Flaky(clock, [error])
        with pytest.raises(type(error)) as caught:
            retrying.complete(provider, REQUEST, max_tries=3, backoff=1.0)
        assert caught.value is error
        assert len(provider.asked) == 1

    with_clock(work)


@given(
    seed=st.integers(0, 2**31 - 1),
    backoff=st.floats(0.001, 10.0),
    max_tries=st.integers(1, 6),
)
def test_pauses_double_with_jitter(seed: int, backoff: float, max_tries: int) -> None:
    def work(clock: Clock) -> None:
        request = replace(REQUEST, seed=seed)
        with pytest.raises(ProviderError):
            retrying.complete(Flaky(clock, [BUSY]), request, max_tries=max_tries, backoff=backoff)

    clock = with_clock(work)
    assert len(clock.pauses) == max_tries - 1
    for i, pause in enumerate(clock.pauses):
        assert 0.5 * backoff * 2**i <= pause <= backoff * 2**i
    assert with_clock(work).pauses == clock.pauses


def test_pauses_differ_by_seed() -> None:
    pauses = set()
    for seed in range(20):

        def work(clock: Clock, seed: int = seed) -> None:
            provider = Flaky(clock, [BUSY, DONE])
            retrying.complete(provider, replace(REQUEST, seed=seed), max_tries=2, backoff=1.0)

        pauses.add(with_clock(work).pauses[0])
    assert len(pauses) == 20
    assert max(pauses) - min(pauses) > 0.25


@given(
    timeout=st.floats(0.01, 100.0),
    backoff=st.floats(0.0, 100.0),
    max_tries=st.integers(1, 8),
    seconds=st.floats(0.0, 50.0),
)
def test_tries_and_pauses_end_at_the_deadline(
    timeout: float, backoff: float, max_tries: int, seconds: float
) -> None:
    def work(clock: Clock) -> None:
        deadline = clock.now + timeout
        provider = Flaky(clock, [BUSY], seconds)
        with pytest.raises(ProviderError):
            retrying.complete(
                provider, replace(REQUEST, timeout=timeout), max_tries=max_tries, backoff=backoff
            )
        # Only the work of the last try itself may have gone beyond.
        assert clock.now - seconds <= deadline + 1e-6
        given = [request.timeout for request in provider.asked]
        assert given[0] == pytest.approx(timeout)
        now = 100.0
        for i, left in enumerate(given):
            assert left == pytest.approx(deadline - now, abs=1e-6)
            assert left >= 0
            now += seconds + (clock.pauses[i] if i < len(clock.pauses) else 0.0)
        if seconds > 0.001:
            assert all(later < earlier for earlier, later in zip(given, given[1:], strict=False))
        # Nothing else of the request changes.
        assert {replace(request, timeout=timeout, schema="") for request in provider.asked} == {
            replace(REQUEST, timeout=timeout, schema="")
        }

    with_clock(work)


@pytest.mark.parametrize(
    ("timeout", "backoff", "seconds", "n_tries"),
    [
        # The first pause is between half and all of the backoff.
        (10.0, 25.0, 0.0, 1),
        (10.0, 1.0, 0.0, 4),
        (10.0, 1.0, 9.9, 1),
        (10.0, 0.0, 3.0, 4),
        (10.0, 0.0, 11.0, 1),
    ],
)
def test_no_try_without_time_left(
    timeout: float, backoff: float, seconds: float, n_tries: int
) -> None:
    def work(clock: Clock) -> None:
        provider = Flaky(clock, [BUSY], seconds)
        with pytest.raises(ProviderError):
            retrying.complete(
                provider, replace(REQUEST, timeout=timeout), max_tries=9, backoff=backoff
            )
        assert len(provider.asked) == n_tries

    with_clock(work)


def test_random_numbers_of_others_stay() -> None:
    def work(clock: Clock) -> None:
        retrying.complete(Flaky(clock, [BUSY, BUSY, DONE]), REQUEST, max_tries=3, backoff=1.0)

    random.seed(0)
    before = random.getstate()
    with_clock(work)
    assert random.getstate() == before


def test_cause_of_the_error() -> None:
    def work(clock: Clock) -> None:
        with pytest.raises(ProviderError) as caught:
            retrying.complete(Flaky(clock, [BUSY]), REQUEST, max_tries=2, backoff=1.0)
        assert caught.value.__cause__ is BUSY

    with_clock(work)
