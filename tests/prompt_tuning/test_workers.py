from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial
from optuna.trial import Trial
from optuna.trial import TrialState
import psutil
import pytest

from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning import fail_dead_trials
from optuna_llm_catalyst.prompt_tuning import workers
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import make_objective


WORKER = """
import sys
import time
import optuna
from optuna_llm_catalyst.prompt_tuning import workers

study = optuna.load_study(study_name="study", storage=sys.argv[1])
trial = study.ask()
workers.claim(trial)
print(trial.number, flush=True)
time.sleep(600)
"""


@contextmanager
def worker(url: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has claimed a trial and works on it, and the trial's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def ask(study: optuna.Study, **worker: object) -> Trial:
    """A running trial, claimed by this process but for what `worker` says otherwise."""
    trial = study.ask()
    mine = {
        "host": workers.platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    records.save(trial, "worker", mine | worker)
    return trial


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Needs POSIX signals.")
def test_a_killed_workers_trial_is_marked_failed_and_only_that(
    tmp_path: Path, sqlite: Callable[[], RDBStorage]
) -> None:
    study = optuna.create_study(storage=sqlite(), study_name="study")
    mine, unclaimed = study.ask(), study.ask()
    workers.claim(mine)
    with worker(f"sqlite:///{tmp_path / 'study.db'}") as (process, number):
        assert fail_dead_trials(study) == []
        assert states(study) == [TrialState.RUNNING] * 3
        process.send_signal(signal.SIGKILL)
        # Nobody has waited for it yet: the process table still has its zombie.
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert fail_dead_trials(study) == [number]
    assert states(study)[number] == TrialState.FAIL
    assert {mine.number, unclaimed.number, number} == {0, 1, 2}
    assert states(study).count(TrialState.RUNNING) == 2
    assert fail_dead_trials(study) == []


def test_a_trial_whose_process_is_gone_is_marked_failed(
    study: optuna.Study, dead_pid: int
) -> None:
    dead = [ask(study, pid=dead_pid).number for _ in range(2)]
    assert fail_dead_trials(study) == dead
    assert states(study) == [TrialState.FAIL] * 2


def test_a_process_of_the_same_id_that_started_at_another_time_is_another_process() -> None:
    study = optuna.create_study()
    started = psutil.Process().create_time()
    earlier = ask(study, started=started - 60)
    later = ask(study, started=started + 60)
    assert fail_dead_trials(study) == [earlier.number, later.number]


def test_a_start_time_may_be_rounded() -> None:
    study = optuna.create_study()
    ask(study, started=psutil.Process().create_time() + 0.01)
    assert fail_dead_trials(study) == []


def test_a_living_workers_trial_is_left_alone() -> None:
    study = optuna.create_study()
    workers.claim(study.ask())
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING]


def test_a_trial_of_another_machine_is_left_alone(dead_pid: int) -> None:
    study = optuna.create_study()
    ask(study, pid=dead_pid, host="elsewhere")
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING]


def test_a_trial_that_no_worker_claimed_is_left_alone() -> None:
    study = optuna.create_study()
    study.ask()
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING]


def test_trials_that_do_not_run_are_left_alone(dead_pid: int) -> None:
    study = optuna.create_study()
    finished = ask(study, pid=dead_pid)
    study.tell(finished, 1.0)
    study.enqueue_trial({})
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.COMPLETE, TrialState.WAITING]


def test_a_process_that_cannot_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    ask(study)

    def refuse(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    assert fail_dead_trials(study) == []


def test_two_workers_may_bury_the_same_trial(
    study: optuna.Study, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = ask(study, pid=dead_pid)
    before = study.get_trials(deepcopy=True)
    study.tell(trial.number, state=TrialState.FAIL)
    # What a worker sees that looked just before another one was faster.
    monkeypatch.setattr(workers.records, "all_trials", lambda study: before)
    fail_dead_trials(study)
    assert states(study) == [TrialState.FAIL]


def test_an_objective_claims_its_trial_for_its_process_before_it_works(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(base_path=str(tmp_path))
    claims = []

    def look(trial: BaseTrial, evaluation: Evaluation) -> None:
        claims.append(records.load(trial, "worker", dict))

    study = optuna.create_study()
    study.optimize(make_objective(store=store, observe=look), n_trials=1)
    assert claims[0] == {
        "host": workers.platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
