"""Which process runs a trial, and what to do with trials whose process is gone.

A stage that dies by SIGKILL leaves its trial RUNNING for ever. Optuna's heartbeat notices after
minutes and in relational storages only; on the same machine the process table knows at once.
"""

from __future__ import annotations

import os
import platform
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState
import psutil

from optuna_llm_catalyst import records


if TYPE_CHECKING:
    from optuna.trial import BaseTrial

#: Start times are read from the same clock, but rounded differently by some systems.
_SAME_START_S = 1.0


def claim(trial: BaseTrial) -> None:
    """Records that this process runs the trial."""
    records.save(trial, "worker", _this_process())


def fail_dead_trials(study: optuna.Study) -> list[int]:
    """Marks running trials of this machine as failed if their process is gone.

    Trials of other machines, and those that no objective of ours runs, are left alone.

    Returns:
        The numbers of the trials that were marked.
    """
    dead = []
    for trial in records.all_trials(study):
        if trial.state == TrialState.RUNNING and _is_dead(
            records.load(trial, "worker", dict[str, Any])
        ):
            # Another worker may be faster by now.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            dead.append(trial.number)
    return dead


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_dead(worker: dict[str, Any] | None) -> bool:
    if worker is None or worker["host"] != platform.node():
        return False
    try:
        process = psutil.Process(worker["pid"])
        # Process ids are used again: the same id with another start is another process.
        same = abs(process.create_time() - worker["started"]) < _SAME_START_S
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False  # Somebody else's process: it lives.
