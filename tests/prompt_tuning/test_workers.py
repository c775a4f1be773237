from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

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


# It loads the one module alone: the package around it takes seconds to import.
WORKER = """
import importlib.util
import sys
import time
import optuna

spec = importlib.util.spec_from_file_location("workers", sys.argv[2])
workers = importlib.util.module_from_spec(spec)
sys.modules["workers"] = workers
spec.loader.exec_module(workers)

study = optuna.load_study(study_name="study", storage=sys.argv[1])
dead = workers.fail_dead_trials(study)
trial = study.ask()
workers.claim(trial)
print(trial.number, dead, flush=True)
time.sleep(600)
"""


@contextmanager
def worker(url: str, *before: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that works on a trial, and the trial's number; it finds no other one dead."""
    command = [*before, sys.executable, "-c", WORKER, url, workers.__file__]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        number, dead = process.stdout.readline().split()
        assert dead == "[]"
        yield process, int(number)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def ask(study: optuna.Study, **worker: object) -> Trial:
    """A running trial, claimed by this process but for what `worker` says otherwise."""
    trial = study.ask()
    records.save(trial, "worker", asdict(workers.this_process()) | worker)
    return trial


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Needs POSIX signals.")
def test_only_a_killed_workers_trial_is_marked_failed(
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


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    study = optuna.create_study()
    started = workers.this_process().started
    earlier, later = ask(study, started=started - 60), ask(study, started=started + 60)
    assert fail_dead_trials(study) == [earlier.number, later.number]


@pytest.mark.skipif(not workers._HAS_PROC, reason="Start times are those of the wall clock.")
def test_a_step_of_the_clock_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    ask(study)
    before = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: before + 3600)
    monkeypatch.setattr(time, "time", lambda: before + 7200)
    assert fail_dead_trials(study) == []


def test_a_living_workers_trial_is_left_alone() -> None:
    study = optuna.create_study()
    workers.claim(study.ask())
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING]


#: What keeps a process id from meaning anything here.
ELSEWHERE: dict[str, dict[str, object]] = {
    "another machine": {"host": "elsewhere"},
    "another boot": {"boot": "0f0f"},
    "another container": {"namespace": "pid:[1]"},
    "an unknown boot": {"boot": ""},
    "an unknown container": {"namespace": ""},
    "an unknown machine": {"host": ""},
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_trial_of_elsewhere_is_left_alone(case: str, dead_pid: int) -> None:
    study = optuna.create_study()
    ask(study, pid=dead_pid, **ELSEWHERE[case])
    assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING]


@pytest.mark.parametrize("place", [("", "pid:[1]"), ("0f0f", "")])
def test_where_this_place_is_unknown_all_are_left_alone(
    place: tuple[str, str], dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study()
    monkeypatch.setattr(workers, "_place", lambda: place)
    ask(study, pid=dead_pid)
    assert fail_dead_trials(study) == []


RECORDS: dict[str, dict[str, Any]] = {
    "of an earlier version": {"host": workers.platform.node(), "pid": 1, "started": 0.0},
    "with a text as id": asdict(workers.this_process()) | {"pid": "1"},
    "with a negative id": asdict(workers.this_process()) | {"pid": -1},
    "with an id beyond all": asdict(workers.this_process()) | {"pid": 10**30},
    "with no start": asdict(workers.this_process()) | {"started": None},
    "empty": {},
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_cannot_be_read_claims_nothing(case: str) -> None:
    study = optuna.create_study()
    records.save(study.ask(), "worker", RECORDS[case])
    assert fail_dead_trials(study) == []


# Real containers, as far as process ids go.


OWN_PROC = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
HOSTS_PROC = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture(params=[OWN_PROC, HOSTS_PROC], ids=["own /proc", "the host's /proc"])
def container(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """A command that runs another in a PID namespace of its own."""
    command: tuple[str, ...] = request.param
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("This system does not let us make a PID namespace.")
    return command


def test_workers_in_other_containers_live(
    container: tuple[str, ...], tmp_path: Path, sqlite: Callable[[], RDBStorage]
) -> None:
    study = optuna.create_study(storage=sqlite(), study_name="study")
    workers.claim(study.ask())  # By an id that nobody has in there.
    with worker(f"sqlite:///{tmp_path / 'study.db'}", *container):
        assert fail_dead_trials(study) == []
    assert states(study) == [TrialState.RUNNING] * 2


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, psutil.AccessDenied])
def test_a_process_that_is_hidden_lives(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study()
    ask(study, started=0.0)
    here = workers.this_process()
    monkeypatch.setattr(workers, "this_process", lambda: here)

    def hide(pid: int) -> tuple[bool, float]:
        raise error(pid)

    monkeypatch.setattr(workers, "_state", hide)
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


def test_an_objective_claims_its_trial_before_it_works(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(base_path=str(tmp_path))
    claims = []

    def look(trial: BaseTrial, evaluation: Evaluation) -> None:
        claims.append(records.load(trial, "worker", dict))

    study = optuna.create_study()
    study.optimize(make_objective(store=store, observe=look), n_trials=1)
    assert claims[0] == asdict(workers.this_process())
    assert claims[0]["pid"] == os.getpid()
