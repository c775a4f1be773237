"""What is kept on a trial beyond its parameters, and how: chunked JSON in system attributes.

The only module that touches Optuna's private storage calls. A record ``name`` is stored as
``llm_catalyst:name:0``, ``:1``, … of at most 2045 characters each (the limit that Optuna's own
samplers keep for every storage) and, written last, ``llm_catalyst:name``, the number of chunks:
a process killed between two writes leaves no half record.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.trajectory import Trajectory


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

PREFIX = "llm_catalyst:"
MAX_CHUNK = 2045
#: The longest text that is kept; a meta-prompt that fills a context of 8192 tokens is shorter.
MAX_TEXT = 32_000
#: Marks a trial whose proposer was asked, from before it is asked, and what came of it.
_ASKED = f"{PREFIX}asked"
_ANSWERED = f"{PREFIX}answered"


def record_trajectory(trial: BaseTrial, trajectory: Trajectory) -> None:
    """Leaves a stage's trajectory on its trial, for the sampler and for everyone who looks.

    Args:
        trial: The running trial, a :class:`optuna.trial.FixedTrial` or a frozen one.
        trajectory: The stage's trajectory; thinned to a dozen points.
    """
    save(trial, "trajectory", trajectory.thinned().to_json())


def load_trajectory(trial: BaseTrial | FrozenTrial) -> Trajectory | None:
    """The trajectory recorded on a trial; None if there is none that can be read."""
    payload = load(trial, "trajectory")
    try:
        return None if payload is None else Trajectory.from_json(payload)
    except (KeyError, TypeError, ValueError):
        return None  # Written by another version.


def record_mistakes(trial: BaseTrial, mistakes: Mistakes) -> None:
    """Leaves on a trial what its trained prompt gets wrong, for the sampler to tell an LLM."""
    save(trial, "mistakes", mistakes.to_json())


def load_mistakes(trial: BaseTrial | FrozenTrial) -> Mistakes | None:
    """The mistakes recorded on a trial; None if there are none that can be read."""
    payload = load(trial, "mistakes")
    try:
        return None if payload is None else Mistakes.from_json(payload)
    except (KeyError, TypeError, ValueError):
        return None  # Written by another version.


def save(trial: BaseTrial, name: str, payload: Mapping[str, Any]) -> None:
    """Saves a record on a running trial, or on one that lives in no storage."""
    if isinstance(trial, Trial):
        for key, value in _entries(name, payload, _system_attrs(trial)):
            trial.storage.set_trial_system_attr(trial._trial_id, key, value)
    else:
        _system_attrs(trial).update(_entries(name, payload, {}))


def save_proposal(study: optuna.Study, trial: FrozenTrial, proposal: Mapping[str, Any]) -> None:
    """Publishes how the restart prompt of a running trial came about.

    Other workers see it before the parameters themselves are set.
    """
    for key, value in _entries("proposal", proposal, trial.system_attrs):
        study._storage.set_trial_system_attr(trial._trial_id, key, value)


def mark_proposal_started(study: optuna.Study, trial: FrozenTrial) -> None:
    """Marks a running trial as one that asks a proposer, before it does."""
    study._storage.set_trial_system_attr(trial._trial_id, _ASKED, trial.number)


def mark_proposal_ended(study: optuna.Study, trial: FrozenTrial, *, succeeded: bool) -> None:
    """Marks a running trial that asked with what came of it."""
    study._storage.set_trial_system_attr(trial._trial_id, _ANSWERED, succeeded)


def proposal_succeeded(trial: FrozenTrial) -> bool | None:
    """Whether a trial that asked got a prompt; None while it is not known."""
    succeeded = trial.system_attrs.get(_ANSWERED)
    return succeeded if isinstance(succeeded, bool) else None


def has_own_proposal(trial: FrozenTrial) -> bool:
    """Whether a trial itself asked a proposer.

    A trial that Optuna runs again after a crash inherits the mark without asking again.
    """
    return trial.system_attrs.get(_ASKED) == trial.number


def set_user_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Sets a user attribute of a running trial of which only the frozen view is at hand."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def load(trial: BaseTrial | FrozenTrial, name: str, kind: Any = dict) -> Any:
    """A record of a trial; None if it is missing or was not written to its end."""
    attrs = _system_attrs(trial)
    n_chunks = attrs.get(PREFIX + name)
    if not isinstance(n_chunks, int):
        return None
    try:
        payload = json.loads("".join(attrs[f"{PREFIX}{name}:{i}"] for i in range(n_chunks)))
    except (KeyError, ValueError):
        return None
    from optuna_llm_catalyst.schema import decode

    try:
        return decode(kind, payload)
    except ValueError:
        return None


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
    """The details as they are, or as a text where JSON has no word for one of them."""
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


def _entries(
    name: str, payload: Mapping[str, Any], present: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """The attributes of a record, in the order in which they must be written."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    chunks = [text[i : i + MAX_CHUNK] for i in range(0, len(text), MAX_CHUNK)]
    entries: list[tuple[str, Any]] = [
        (f"{PREFIX}{name}:{i}", chunk) for i, chunk in enumerate(chunks)
    ]
    if PREFIX + name in present:
        # A record that is overwritten is none until it is whole again.
        entries.insert(0, (PREFIX + name, None))
    return [*entries, (PREFIX + name, len(chunks))]


def _system_attrs(trial: BaseTrial | FrozenTrial) -> dict[str, Any]:
    if isinstance(trial, Trial):
        return trial.storage.get_trial(trial._trial_id).system_attrs
    attrs: dict[str, Any] = trial.system_attrs  # type: ignore[attr-defined]
    return attrs
