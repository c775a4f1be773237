"""Which process runs a trial, and what to do with trials whose process is gone.

A stage that dies by SIGKILL leaves its trial RUNNING for ever. Optuna's heartbeat notices after
minutes and in relational storages only; on the same machine the process table knows at once.
Whatever is not known to be dead is left alone.
"""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
import os
from pathlib import Path
import platform
import sys

import optuna
from optuna.trial import BaseTrial
from optuna.trial import TrialState
import psutil

from optuna_llm_catalyst import records


_HAS_PROC = sys.platform.startswith("linux")


@dataclass(frozen=True)
class Worker:
    """A process, as its trials record it.

    A process id means something only within one boot and one PID namespace (a container has its
    own); each is empty if it is not known. Ids are used again by processes that start later:
    ``started`` is in clock ticks since the boot where the system tells, which no step of the
    clock changes, else in seconds since 1970.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: float

    def __post_init__(self) -> None:
        if not 0 < self.pid < 2**31:
            raise ValueError(f"a process id must be positive, got {self.pid}")


def claim(trial: BaseTrial) -> None:
    """Records that this process runs the trial."""
    records.save(trial, "worker", asdict(this_process()))


def fail_dead_trials(study: optuna.Study) -> list[int]:
    """Marks running trials of this machine as failed if their process is gone.

    Trials of other machines or containers, and those that no objective of ours runs, are left
    alone.

    Returns:
        The numbers of the trials that were marked.
    """
    here = this_process()
    dead = []
    for trial in records.all_trials(study):
        if trial.state != TrialState.RUNNING:
            continue
        worker = records.load(trial, "worker", Worker)
        if worker is not None and _is_dead(worker, here):
            # Another worker may be faster by now.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            dead.append(trial.number)
    return dead


def this_process() -> Worker:
    """The process that calls."""
    try:
        place, started = _place(), _state(os.getpid())[1]
    except (OSError, psutil.Error):  # For example, /proc may be missing.
        place, started = ("", ""), 0.0
    return Worker(platform.node(), *place, os.getpid(), started)


def _is_dead(worker: Worker, here: Worker) -> bool:
    place = (worker.host, worker.boot, worker.namespace)
    if not all(place) or place != (here.host, here.boot, here.namespace):
        return False
    try:
        is_zombie, started = _state(worker.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True
    except (OSError, psutil.Error):
        return False  # It may be somebody else's, which the system hides.
    return is_zombie or started != worker.started


def _place() -> tuple[str, str]:
    """This boot of the machine, and where process ids are valid; empty if that is not known."""
    if not _HAS_PROC:
        return str(psutil.boot_time()), "the only one"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # A container may see the processes of its host there.
    is_ours = os.readlink("/proc/self") == str(os.getpid())
    return boot, os.readlink("/proc/self/ns/pid") if is_ours else ""


def _state(pid: int) -> tuple[bool, float]:
    """Whether a process has ended without being waited for, and when it started."""
    if not _HAS_PROC:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE, process.create_time()
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        os.kill(pid, 0)  # Sends nothing, but raises another error if the process is gone.
        raise
    # The name before the last bracket may hold anything; see proc_pid_stat(5).
    fields = text.rpartition(")")[2].split()
    return fields[0] in {"Z", "X"}, float(fields[19])
