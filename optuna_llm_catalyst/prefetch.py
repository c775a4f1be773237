"""Proposals that are made while a stage trains: at most one per study and set of fixed tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import Future
import threading
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from optuna_llm_catalyst import background
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import Proposal


#: Proposals with the number of the trial that each is for.
UnderWay = dict[Any, tuple[int, Future[Proposal]]]
#: A lock on a planner could not be pickled.
_LOCK = threading.Lock()


def start(
    under_way: UnderWay,
    study: optuna.Study,
    fixed: Mapping[int, int],
    work_of: Callable[[int], Callable[[], Proposal] | None],
) -> None:
    """Starts the proposal for the next new trial; ``work_of`` its number is None for none."""
    key = _key(study, fixed)
    # A trial is created before it looks here. Under the lock it cannot miss its own proposal.
    with _LOCK:
        if key in under_way:
            return
        number = len(records.all_trials(study))
        work = work_of(number)
        if work is not None:
            under_way[key] = number, background.start(work)


def take(
    under_way: UnderWay, study: optuna.Study, trial: FrozenTrial, fixed: Mapping[int, int]
) -> Future[Proposal] | None:
    """The proposal for a trial, or for an earlier one that did without it; None if none is."""
    key = _key(study, fixed)
    with _LOCK:
        if key not in under_way:
            return None
        number, proposal = under_way[key]
        if number != trial.number and not _does_without(study, trial, number):
            return None
        del under_way[key]
        return proposal


def _does_without(study: optuna.Study, trial: FrozenTrial, number: int) -> bool:
    """Whether an earlier trial is over, or made its own request in another process."""
    if number > trial.number:
        return False
    earlier = records.all_trials(study)[number]
    return earlier.state.is_finished() or records.has_own_proposal(earlier)


def _key(study: optuna.Study, fixed: Mapping[int, int]) -> Any:
    return records.identity(study), frozenset(fixed.items())
