"""Ctrl-C at any moment leaves a storage that still works."""

from __future__ import annotations

from pathlib import Path
import random
import signal
import threading
import time

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import pytest
import sqlalchemy

from optuna_llm_catalyst.cli import interrupts
from optuna_llm_catalyst.cli.interrupts import between_storage_calls


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    # A lock that nobody opens again is then an error soon.
    waits = {"connect_args": {"timeout": 0.5}}
    return RDBStorage(f"sqlite:///{tmp_path}/study.db", engine_kwargs=waits)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_a_transaction(storage: RDBStorage) -> None:
    trial = optuna.create_study(storage=storage).ask()
    sqlalchemy.event.listen(storage.engine, "commit", _interrupt)

    with between_storage_calls(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        trial.report(0.5, 1)
        time.sleep(60)  # Woken by the interrupt.

    sqlalchemy.event.remove(storage.engine, "commit", _interrupt)
    assert trial.study.trials[0].intermediate_values == {1: 0.5}


def test_a_storage_that_hangs_is_left(
    storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(interrupts, "_MAX_DELAY_S", 0.1)
    study = optuna.create_study(storage=storage)
    sqlalchemy.event.listen(storage.engine, "begin", hang)

    with between_storage_calls(), pytest.raises(KeyboardInterrupt):
        study.ask()


def test_trials_that_are_interrupted_at_any_moment_can_be_told(storage: RDBStorage) -> None:
    """Without the guard one interrupt in about 100 leaves the database locked."""
    study = optuna.create_study(storage=storage)
    moments = random.Random(0)
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        with between_storage_calls():
            for _ in range(20):
                trial = study.ask()
                with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                    signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.05))
                    for step in range(10_000):
                        trial.report(1.0, step)
                        time.sleep(0.002)
                study.tell(trial, state=TrialState.FAIL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert {trial.state for trial in study.trials} == {TrialState.FAIL}


def test_outside_a_storage_an_interrupt_comes_at_once() -> None:
    started = time.monotonic()
    with between_storage_calls(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert time.monotonic() - started < interrupts._MAX_DELAY_S
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_interrupts_goes_on_to() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_storage_calls():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_interrupts() -> None:
    seen = []

    def run() -> None:
        with between_storage_calls():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
