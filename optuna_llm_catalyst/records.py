"""What is kept on a trial beyond its parameters, and how: chunked JSON in system attributes.

The only module that touches Optuna's private storage calls. A record ``name`` is stored as
``llm_catalyst:name:0``, ``:1``, … of at most 2045 characters each (the limit that Optuna's own
samplers keep for every storage) and, written last, ``llm_catalyst:name``, the number of chunks:
a process killed between two writes leaves no half record. What does not fit counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import is_dataclass
from datetime import datetime
from functools import lru_cache
import json
import os
from typing import Any
from typing import TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import PartialFixedSampler
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.mistakes import EnsembleRecord
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.trajectory import Trajectory


T = TypeVar("T")

PREFIX = "llm_catalyst:"
MAX_CHUNK = 2045
#: The states of trials that give values.
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
#: The longest text that is kept; a meta-prompt that fills a context of 8192 tokens is shorter.
MAX_TEXT = 32_000
#: Marks a trial of which a proposal is requested, before it is, and what came of it.
_REQUESTED = f"{PREFIX}asked"
_SUCCEEDED = f"{PREFIX}answered"
#: Somebody else may have written a record: no JSON, JSON that is too deep, or another form.
_UNREADABLE = (KeyError, TypeError, ValueError, RecursionError, OverflowError)
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate, and its value without training if it was screened."""

    token_ids: tuple[int, ...]
    score: float | None = None


@dataclass(frozen=True)
class ProposalRecord:
    """What is read of the record ``proposal``: the prompt that runs, and all candidates."""

    token_ids: tuple[int, ...] = ()
    n_truncated: int = 0
    candidates: tuple[CandidateRecord, ...] = ()


def record_trajectory(trial: BaseTrial, trajectory: Trajectory) -> None:
    """Leaves a stage's trajectory, thinned to a dozen points, on its running or frozen trial."""
    save(trial, "trajectory", trajectory.thinned().to_json())


def load_trajectory(trial: BaseTrial) -> Trajectory | None:
    """The trajectory recorded on a trial; None if there is none that can be read."""
    return load(trial, "trajectory", Trajectory)


def record_mistakes(trial: BaseTrial, mistakes: Mistakes) -> None:
    """Leaves on a trial what its trained prompt gets wrong, for the sampler to tell an LLM."""
    save(trial, "mistakes", mistakes.to_json())


def load_mistakes(trial: BaseTrial) -> Mistakes | None:
    """The mistakes recorded on a trial; None if there are none that can be read."""
    return load(trial, "mistakes", Mistakes)


def record_ensemble(trial: BaseTrial, record: EnsembleRecord) -> None:
    """Leaves on a trial what the ensemble came to with its stage."""
    save(trial, "ensemble", record.to_json())


def load_ensemble(trial: BaseTrial) -> EnsembleRecord | None:
    """The ensemble recorded on a trial; None if there is none that can be read."""
    return load(trial, "ensemble", EnsembleRecord)


def save(trial: BaseTrial, name: str, payload: Any) -> None:
    """Saves a record on a running trial, or on one that lives in no storage."""
    if isinstance(trial, Trial):
        _write(trial.storage, trial._trial_id, name, payload)
    else:
        _system_attrs(trial).update(_entries(name, payload, {}))


def save_proposal(study: optuna.Study, trial: FrozenTrial, proposal: Mapping[str, Any]) -> None:
    """Publishes the restart prompt of a running trial, before its parameters are set."""
    _write(study._storage, trial._trial_id, "proposal", proposal)


def load(trial: BaseTrial, name: str, kind: type[T]) -> T | None:
    """A record of a trial as a type; None if it is missing, not whole or of another form.

    A record of another form is named once in the log. Dataclasses are shared between calls.
    """
    attrs = _system_attrs(trial)
    try:
        return _read(attrs, name, kind)
    except _UNREADABLE as error:
        _name_unreadable(trial.datetime_start, f"trial {trial.number}", name, _why(error))
        return None


def save_to_study(study: optuna.Study, name: str, payload: Any) -> None:
    """Saves a record on a study. Never within a trial: those of several workers would race."""
    present = study._storage.get_study_system_attrs(study._study_id)
    for key, value in _entries(name, payload, present):
        study._storage.set_study_system_attr(study._study_id, key, value)


def load_from_study(study: optuna.Study, name: str, kind: type[T]) -> T | None:
    """A record of a study as a type; None if it is missing, not whole or of another form."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    try:
        return _read(attrs, name, kind)
    except _UNREADABLE as error:
        _name_unreadable(None, f"study {study.study_name!r}", name, _why(error))
        return None


def mark_proposal_started(study: optuna.Study, trial: FrozenTrial) -> None:
    """Marks a running trial as one for which a proposal is requested, before it is."""
    study._storage.set_trial_system_attr(trial._trial_id, _REQUESTED, trial.number)


def mark_proposal_ended(study: optuna.Study, trial: FrozenTrial, *, succeeded: bool) -> None:
    """Marks a running trial with what came of its request."""
    study._storage.set_trial_system_attr(trial._trial_id, _SUCCEEDED, succeeded)


def proposal_succeeded(trial: FrozenTrial) -> bool | None:
    """Whether the request of a trial gave a prompt; None while it is not known."""
    succeeded = trial.system_attrs.get(_SUCCEEDED)
    return succeeded if isinstance(succeeded, bool) else None


def has_own_proposal(trial: FrozenTrial) -> bool:
    """Whether a trial itself requested a proposal."""
    # A trial that Optuna runs again after a crash inherits the mark without a request of its own.
    return trial.system_attrs.get(_REQUESTED) == trial.number


def set_user_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Sets a user attribute of a running trial of which only the frozen view is at hand."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def see_user_attrs(trial: BaseTrial) -> None:
    """Shows a live trial the user attributes that its sampler set in the storage."""
    if isinstance(trial, Trial):
        stored = trial.storage.get_trial(trial._trial_id).user_attrs
        trial._cached_frozen_trial.user_attrs.update(stored)


def enqueued_params(trial: BaseTrial) -> Mapping[str, Any]:
    """The parameters that ``enqueue_trial`` gave a trial."""
    params = _system_attrs(trial).get("fixed_params")
    return params if isinstance(params, Mapping) else {}


def fixed_by_sampler(study: optuna.Study) -> dict[str, Any]:
    """The parameters that ``PartialFixedSampler`` fixes; the outermost one counts."""
    fixed: dict[str, Any] = {}
    sampler = study.sampler
    while isinstance(sampler, PartialFixedSampler):
        fixed = {**sampler._fixed_params, **fixed}
        sampler = sampler._base_sampler
    return fixed


def identity(study: optuna.Study) -> tuple[int, BaseStorage, int]:
    """What tells a study from all others in this process, and this process from its forks."""
    return os.getpid(), study._storage, study._study_id


def all_trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials of a study as they are now in the storage. Read only: they are not copies."""
    return study._get_trials(deepcopy=False, use_cache=False)


def start_trial(
    study: optuna.Study,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    user_attrs: Mapping[str, Any],
) -> Trial:
    """Starts a running trial of given parameters.

    Unlike ``enqueue_trial`` and ``ask``, no other worker and no other trial of the queue can
    come in between.
    """
    template = optuna.create_trial(
        state=TrialState.RUNNING,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs=dict(user_attrs),
    )
    return Trial(study, study._storage.create_new_trial(study._study_id, template_trial=template))


def jsonable(details: Mapping[str, Any]) -> dict[str, Any]:
    """The details as they are, or their ``repr`` if they cannot be written as JSON."""
    try:
        json.dumps(details, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return {"details": clip(repr(details))}
    return dict(details)


def clip(text: str, limit: int = MAX_TEXT) -> str:
    """The text, cut where a storage could refuse it; the cut is said."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… [{len(text) - limit} characters cut]"


def _write(storage: BaseStorage, trial_id: int, name: str, payload: Any) -> None:
    present = storage.get_trial(trial_id).system_attrs
    for key, value in _entries(name, payload, present):
        storage.set_trial_system_attr(trial_id, key, value)


def _entries(name: str, payload: Any, present: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The attributes of a record, in the order in which they must be written."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    chunks = [text[i : i + MAX_CHUNK] for i in range(0, len(text), MAX_CHUNK)]
    # While a record is overwritten, it counts as absent.
    unwritten: list[tuple[str, Any]] = [(PREFIX + name, None)] if PREFIX + name in present else []
    written = [(f"{PREFIX}{name}:{i}", chunk) for i, chunk in enumerate(chunks)]
    return [*unwritten, *written, (PREFIX + name, len(chunks))]


def _parse(text: str, kind: type[T]) -> T:
    return decode(kind, json.loads(text))


#: Each proposal reads the best trials again: what was parsed once is kept.
_parse_shared = lru_cache(maxsize=256)(_parse)


def _read(attrs: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    n_chunks = attrs.get(PREFIX + name)
    if n_chunks is None:
        return None
    text = "".join(attrs[f"{PREFIX}{name}:{i}"] for i in range(n_chunks))
    return _parse_shared(text, kind) if is_dataclass(kind) else _parse(text, kind)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@lru_cache(maxsize=10_000)
def _name_unreadable(start: datetime | None, whose: str, name: str, why: str) -> None:
    """Logs a line once a trial, which number and start tell from those of other studies."""
    _logger.warning(
        f"The record {PREFIX + name!r} of {whose} cannot be read and counts as absent: "
        f"{one_line(why)}"
    )


def _system_attrs(trial: BaseTrial) -> dict[str, Any]:
    if isinstance(trial, Trial):
        return trial.storage.get_trial(trial._trial_id).system_attrs
    attrs: dict[str, Any] = trial.system_attrs  # type: ignore[attr-defined]
    return attrs
