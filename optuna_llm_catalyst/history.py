"""A study as a proposer sees it: ranked, deduplicated prompts and what is being tried now.

Every ask reads the whole study afresh, so the pass over all trials only compares numbers; the
records, which are JSON, are parsed for the best trials alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
import math
from operator import itemgetter
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import TYPE_CHECKING

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.trajectory import best_swaps
from optuna_llm_catalyst.trajectory import DriftWord
from optuna_llm_catalyst.trajectory import Swap


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

TokenIds = tuple[int, ...]

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class HistoryPoint:
    """A prompt and what is known of it.

    Attributes:
        prompt: The prompt.
        kind: ``stage`` if training started from it, ``candidate`` if it was only screened,
            ``projection`` if it is what a trained prompt projects to.
        trial_number: The trial that knows it.
        value: The study's value: after the stage, or without training for the other kinds.
        before: The study's value before training; None if not reported.
        accuracy_before: Accuracy before training, None if not recorded.
        accuracy: Accuracy after the stage, None if not recorded.
        pruned: Whether the stage was stopped early.
        swaps: Single-word swaps that were measured to help, best first.
        drift: Words towards which the virtual tokens moved, strongest first.
        mistakes: What the trained prompt gets wrong, None if not recorded.
    """

    prompt: RestartPrompt
    kind: Literal["stage", "candidate", "projection"]
    trial_number: int
    value: float
    before: float | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    pruned: bool = False
    swaps: tuple[Swap, ...] = ()
    drift: tuple[DriftWord, ...] = ()
    mistakes: Mistakes | None = None


class Outcome(NamedTuple):
    """A finished stage in three numbers: its trial, its prompt, its value."""

    trial_number: int
    token_ids: TokenIds
    value: float


class PastProposal(NamedTuple):
    """A trial that asked the proposer: whether that gave a prompt, None while it is open."""

    trial_number: int
    succeeded: bool | None


@dataclass(frozen=True)
class History:
    """What a proposer may know of a study.

    Attributes:
        points: The best prompts, best first: stages, then prompts that were never trained.
        in_flight: Prompts that running and waiting trials try now.
        tried: Token ids of every prompt that is finished, running or waiting.
        failures: How often a trial of a prompt failed.
        n_finished: Finished stages, complete or pruned, refined ones included.
        outcomes: Finished stages that have a value, refined ones excluded, oldest first.
        proposals: Trials that asked the proposer, oldest first.
        minimize: Whether a lower value is better.
    """

    points: tuple[HistoryPoint, ...] = ()
    in_flight: tuple[RestartPrompt, ...] = ()
    tried: frozenset[TokenIds] = field(default=frozenset(), repr=False)
    failures: Mapping[TokenIds, int] = field(default_factory=dict)
    n_finished: int = 0
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False)
    proposals: tuple[PastProposal, ...] = ()
    minimize: bool = True

    @property
    def stages(self) -> tuple[HistoryPoint, ...]:
        """The points that were trained, best first."""
        return tuple(point for point in self.points if point.kind == "stage")


def from_study(
    study: optuna.Study, space: PromptSpace, *, top_k: int, exclude: int | None = None
) -> History:
    """Reads a study.

    Args:
        study: The study; of any storage, single-objective.
        space: The prompts' space; trials without its parameters are passed over.
        top_k: How many points to return at most.
        exclude: Number of the trial that proposals, which is not part of its own history.

    Raises:
        StudyMismatchError: If the study's prompts are not of this space.
    """
    minimize = study.direction == StudyDirection.MINIMIZE
    token_ids_of = _token_ids_getter(space)
    finished: list[FrozenTrial] = []
    token_ids: list[TokenIds] = []
    failures: Counter[TokenIds] = Counter()
    flying: list[FrozenTrial] = []
    last: FrozenTrial | None = None
    proposals: list[PastProposal] = []
    for trial in records.all_trials(study):
        if records.has_own_proposal(trial) and trial.number != exclude:
            proposals.append(PastProposal(trial.number, records.proposal_succeeded(trial)))
        if trial.state in _FINISHED:
            last = trial
            try:
                token_ids.append(token_ids_of(trial.params))
            except KeyError:
                continue
            finished.append(trial)
        elif trial.state in _UNFINISHED:
            if trial.number != exclude:
                flying.append(trial)
        else:
            with suppress(KeyError):  # It failed before it had a prompt.
                failures[token_ids_of(trial.params)] += 1
    if last is not None:
        space.check([last])
    in_flight = _in_flight(flying, space)
    return History(
        points=_top_points(finished, token_ids, space, minimize=minimize, top_k=top_k),
        in_flight=in_flight,
        tried=frozenset([*token_ids, *(prompt.token_ids for prompt in in_flight)]),
        failures=failures,
        n_finished=len(finished),
        outcomes=tuple(
            Outcome(trial.number, ids, value)
            for trial, ids in zip(finished, token_ids, strict=True)
            if (value := trial.value) is not None
            and not math.isnan(value)
            and trial.user_attrs.get("origin") != "refine"
        ),
        proposals=tuple(proposals),
        minimize=minimize,
    )


def running(study: optuna.Study, space: PromptSpace, *, exclude: int) -> frozenset[TokenIds]:
    """The prompts of all running trials but one."""
    trials = [
        trial
        for trial in records.all_trials(study)
        if trial.state == TrialState.RUNNING and trial.number != exclude
    ]
    return frozenset(prompt.token_ids for prompt in _in_flight(trials, space))


def _token_ids_getter(space: PromptSpace) -> Callable[[Mapping[str, Any]], TokenIds]:
    """A function from a trial's params to its token ids: one C call for all names.

    It raises KeyError for params of something else.
    """
    names = space.param_names
    if len(names) == 1:
        return lambda params: (params[names[0]],)
    return itemgetter(*names)


def _in_flight(trials: Iterable[FrozenTrial], space: PromptSpace) -> tuple[RestartPrompt, ...]:
    token_ids_of = _token_ids_getter(space)
    found: dict[TokenIds, None] = {}
    for trial in trials:
        proposal = records.load(trial, "proposal") or {}
        token_ids: Sequence[int] = proposal.get("token_ids", ())
        for params in (trial.system_attrs.get("fixed_params", {}), trial.params):
            with suppress(KeyError):
                token_ids = token_ids_of(params)
        # Optuna lets anything be enqueued; what is no prompt of the space cannot collide.
        inside = all(0 <= token_id < space.vocab_size for token_id in token_ids)
        if inside and len(token_ids) == space.num_virtual_tokens:
            found[tuple(token_ids)] = None
    return tuple(space.from_token_ids(token_ids) for token_ids in found)


def _top_points(
    trials: Sequence[FrozenTrial],
    token_ids: Sequence[TokenIds],
    space: PromptSpace,
    *,
    minimize: bool,
    top_k: int,
) -> tuple[HistoryPoint, ...]:
    sign = 1.0 if minimize else -1.0
    values = [trial.value for trial in trials]
    ranks = np.array([math.nan if value is None else sign * value for value in values])
    points: dict[TokenIds, HistoryPoint] = {}
    ranked: list[FrozenTrial] = []
    # The same prompt may have been trained more than once: its best stage speaks for it.
    for i in np.argsort(ranks, kind="stable"):
        if len(points) == top_k or math.isnan(ranks[i]):
            break
        # A refined stage did not start from its words: it says nothing about them.
        if token_ids[i] not in points and trials[i].user_attrs.get("origin") != "refine":
            points[token_ids[i]] = _stage_point(trials[i], space.from_token_ids(token_ids[i]))
            ranked.append(trials[i])
    # A value after training and a value without are different things: prompts that were never
    # trained fill up a short history and are ranked among themselves.
    if len(points) < top_k:
        untrained = _untrained_points(ranked, space, lower_is_better=minimize)
        for point in sorted(untrained, key=lambda point: sign * point.value):
            if len(points) < top_k:
                points.setdefault(point.prompt.token_ids, point)
    return tuple(points.values())


def _stage_point(trial: FrozenTrial, prompt: RestartPrompt) -> HistoryPoint:
    trajectory = records.load_trajectory(trial)
    points = trajectory.points if trajectory else ()
    best = trajectory.best if trajectory else None
    reported = trial.intermediate_values
    assert trial.value is not None
    return HistoryPoint(
        prompt=prompt,
        kind="stage",
        trial_number=trial.number,
        value=trial.value,
        before=reported[min(reported)] if reported else None,
        accuracy_before=points[0].accuracy if points else None,
        accuracy=best.accuracy if best else None,
        pruned=trial.state == TrialState.PRUNED,
        swaps=best_swaps(points),
        drift=best.drift if best else (),
        mistakes=records.load_mistakes(trial),
    )


def _untrained_points(
    trials: Iterable[FrozenTrial], space: PromptSpace, *, lower_is_better: bool
) -> Iterable[HistoryPoint]:
    for trial in trials:
        for candidate in (records.load(trial, "proposal") or {}).get("candidates", ()):
            if candidate.get("score") is not None:
                prompt = space.from_token_ids(candidate["token_ids"])
                yield HistoryPoint(prompt, "candidate", trial.number, candidate["score"])
        trajectory = records.load_trajectory(trial)
        # The loss of projected words is comparable with the study's value if that is a loss.
        for point in trajectory.points if trajectory and lower_is_better else ():
            if point.hard_loss is not None and len(point.token_ids) == space.num_virtual_tokens:
                prompt = space.from_token_ids(point.token_ids)
                yield HistoryPoint(prompt, "projection", trial.number, point.hard_loss)
