from __future__ import annotations

import asyncio
from collections.abc import Iterator
import threading
import time

import pytest

from optuna_llm_catalyst import background
from optuna_llm_catalyst.background import run_within
from tests.toy_stage import run_python


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("seconds", [60, 1e10, 1e300, float("inf")])
def test_work_done_in_time(seconds: float) -> None:
    """Whatever the time is, threads and event loops take it."""
    assert run_within(seconds, answer) == 42


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("x"), OSError(5, "disk")])
def test_error_of_the_work_is_raised(error: Exception) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_within(5, fail)
    assert caught.value is error


@pytest.mark.parametrize("seconds", [0.1, 0.0, -3.0])
def test_longer_work_is_ended(seconds: float) -> None:
    """Without an end the test would hang."""
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"not done within {seconds:g} seconds"):
        run_within(seconds, for_ever)
    assert time.monotonic() - started >= seconds


def test_ended_work_cleans_up() -> None:
    cleaned = threading.Event()

    async def work() -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    with pytest.raises(TimeoutError):
        run_within(0.1, work)
    assert cleaned.is_set()


def test_work_that_cannot_be_ended_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_GRACE_S", 0.1)
    release = threading.Event()

    async def blocking() -> None:
        release.wait()

    async def in_a_thread() -> None:  # As the look-up of a host's name is.
        await asyncio.get_running_loop().run_in_executor(None, release.wait)

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass

    try:
        for work in (blocking, in_a_thread, stubborn):
            with pytest.raises(TimeoutError):
                run_within(0.1, work)
            assert not release.is_set()
    finally:
        release.set()


def test_inside_a_running_event_loop() -> None:
    async def cell() -> int:
        return run_within(5, answer)

    assert asyncio.run(cell()) == 42


def test_left_work_does_not_keep_a_process_alive() -> None:
    code = (
        "import time; from optuna_llm_catalyst import background\n"
        "background._GRACE_S = 0.0\n"
        "async def work(): time.sleep(600)\n"
        "try: background.run_within(0.1, work)\n"
        "except TimeoutError: print('late')"
    )
    assert run_python(code) == "late\n"  # It has 120 seconds.
