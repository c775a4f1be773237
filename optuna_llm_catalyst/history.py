"""A study as a proposer sees it: ranked, deduplicated prompts and what is being tried now.

Each proposal reads the whole study afresh, so the pass over all trials only compares numbers;
the records, which are JSON, are parsed for the best trials alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from datetime import datetime
from typing import Any
from typing import Literal
from typing import NamedTuple

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.mistakes import EnsembleRecord
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import NAME_PREFIX
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.study_check import check_trials
from optuna_llm_catalyst.trajectory import best_swaps
from optuna_llm_catalyst.trajectory import DriftWord
from optuna_llm_catalyst.trajectory import Swap
from optuna_llm_catalyst.trajectory import Trajectory


TokenIds = tuple[int, ...]

#: The ensemble is read off so many of the last stages.
_MAX_ENSEMBLES = 32
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
        params: The trial's parameters beside the prompt's, such as a learning rate.
        text_prompt: Which prompt stood before the texts, as the stage says; "" if it does not.
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
    params: Mapping[str, Any] = field(default_factory=dict)
    text_prompt: str = ""


class Outcome(NamedTuple):
    """A finished stage in three numbers: its trial, its prompt, its value."""

    trial_number: int
    token_ids: TokenIds
    value: float


class PastProposal(NamedTuple):
    """A trial that requested a proposal: whether that gave a prompt, None while it is open."""

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
        proposals: Trials that requested a proposal, oldest first.
        minimize: Whether a lower value is better.
        ensemble: The largest ensemble that a finished stage has recorded, None if none has.
    """

    points: tuple[HistoryPoint, ...] = ()
    in_flight: tuple[RestartPrompt, ...] = ()
    tried: frozenset[TokenIds] = field(default=frozenset(), repr=False)
    failures: Mapping[TokenIds, int] = field(default_factory=dict)
    n_finished: int = 0
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False)
    proposals: tuple[PastProposal, ...] = ()
    minimize: bool = True
    ensemble: EnsembleRecord | None = None

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
        space: The prompts' space; trials without a prompt of it are passed over.
        top_k: How many points to return at most.
        exclude: Number of the trial that proposes, which is not part of its own history.

    Raises:
        StudyMismatchError: If the study's prompts are not of this space.
    """
    minimize = study.direction == StudyDirection.MINIMIZE
    trials = records.all_trials(study)
    others = [trial for trial in trials if trial.number != exclude]
    finished = [trial for trial in trials if trial.state in records.FINISHED]
    check_trials(space, finished[-1:])
    in_flight = _in_flight([trial for trial in others if trial.state in _UNFINISHED], space)
    tried: list[TokenIds] = []
    stages: list[tuple[FrozenTrial, Outcome]] = []
    failures: Counter[TokenIds] = Counter()
    for trial in trials:
        token_ids = space.find(trial.params)
        # A trial without a prompt failed before it had one, or is of something else.
        if token_ids is None:
            continue
        if trial.state == TrialState.FAIL:
            failures[token_ids] += 1
        elif trial.state in records.FINISHED:
            tried.append(token_ids)
            value = _value(trial, minimize)
            # A refined stage did not start from its words: it says nothing about them.
            if value is not None and trial.user_attrs.get("origin") != "refine":
                stages.append((trial, Outcome(trial.number, token_ids, value)))
    return History(
        points=_top_points(stages, space, minimize, top_k),
        in_flight=in_flight,
        tried=frozenset(tried).union(prompt.token_ids for prompt in in_flight),
        failures=failures,
        n_finished=len(tried),
        outcomes=tuple(outcome for _, outcome in stages),
        proposals=tuple(
            PastProposal(trial.number, records.proposal_succeeded(trial))
            for trial in filter(records.has_own_proposal, others)
        ),
        minimize=minimize,
        ensemble=_ensemble(finished),
    )


def taken_meanwhile(
    study: optuna.Study, space: PromptSpace, trial: FrozenTrial
) -> frozenset[TokenIds]:
    """The prompts of the other trials that run, or finished since this one started."""
    start = trial.datetime_start or datetime.max

    def is_meanwhile(other: FrozenTrial) -> bool:
        is_recent = (other.datetime_complete or datetime.min) >= start
        return other.state == TrialState.RUNNING or other.state in records.FINISHED and is_recent

    trials = (t for t in records.all_trials(study) if t.number != trial.number)
    others = filter(is_meanwhile, trials)
    return frozenset(prompt.token_ids for prompt in _in_flight(others, space))


def _value(trial: FrozenTrial, minimize: bool) -> float | None:
    """A trial's value; of a pruned one the best that it reported, as Optuna keeps the last."""
    if trial.state == TrialState.PRUNED:
        reported = [v for v in trial.intermediate_values.values() if v == v]  # No NaN.
        if reported:
            return min(reported) if minimize else max(reported)
    value = trial.value
    return value if value == value else None


def _in_flight(trials: Iterable[FrozenTrial], space: PromptSpace) -> tuple[RestartPrompt, ...]:
    found: dict[TokenIds, None] = {}
    for trial in trials:
        token_ids = space.find(trial.params) or space.find(records.enqueued_params(trial))
        if token_ids is None:
            proposal = records.load(trial, "proposal", records.ProposalRecord)
            token_ids = proposal.token_ids if proposal else ()
        if space.is_prompt(token_ids):
            found[token_ids] = None
    return tuple(space.from_token_ids(token_ids) for token_ids in found)


def _ensemble(finished: Sequence[FrozenTrial]) -> EnsembleRecord | None:
    """The recorded ensemble of most members, of several the latest trial's."""
    # Workers finish out of order, but none of them far behind the others.
    recorded = filter(None, map(records.load_ensemble, finished[-_MAX_ENSEMBLES:]))
    return max(reversed([*recorded]), key=lambda record: record.n_members, default=None)


def _top_points(
    stages: Iterable[tuple[FrozenTrial, Outcome]], space: PromptSpace, minimize: bool, top_k: int
) -> tuple[HistoryPoint, ...]:
    sign = 1.0 if minimize else -1.0
    best: dict[TokenIds, tuple[FrozenTrial, Outcome]] = {}
    # The same prompt may have been trained more than once: its best stage speaks for it.
    for trial, outcome in sorted(stages, key=lambda stage: sign * stage[1].value):
        best.setdefault(outcome.token_ids, (trial, outcome))
        if len(best) == top_k:
            break
    points = {ids: _stage_point(trial, outcome, space) for ids, (trial, outcome) in best.items()}
    # A value after training and a value without are different things: prompts that were never
    # trained fill up a short history and are ranked among themselves.
    if len(points) < top_k:
        trials = [trial for trial, _ in best.values()]
        untrained = _untrained_points(trials, space, lower_is_better=minimize)
        for point in sorted(untrained, key=lambda point: sign * point.value):
            points.setdefault(point.prompt.token_ids, point)
    return tuple(points.values())[:top_k]


def _stage_point(trial: FrozenTrial, outcome: Outcome, space: PromptSpace) -> HistoryPoint:
    trajectory = records.load_trajectory(trial) or Trajectory(())
    points, best = trajectory.points, trajectory.best
    reported = trial.intermediate_values
    prompt = space.from_token_ids(outcome.token_ids)
    proposal = records.load(trial, "proposal", records.ProposalRecord)
    if proposal and proposal.token_ids == outcome.token_ids:
        prompt = replace(prompt, n_truncated=proposal.n_truncated)
    return HistoryPoint(
        prompt=prompt,
        kind="stage",
        trial_number=trial.number,
        value=outcome.value,
        before=reported[min(reported)] if reported else None,
        accuracy_before=points[0].accuracy if points else None,
        accuracy=best.accuracy if best else None,
        pruned=trial.state == TrialState.PRUNED,
        swaps=best_swaps(points),
        drift=best.drift if best else (),
        mistakes=records.load_mistakes(trial),
        params={k: v for k, v in trial.params.items() if not k.startswith(NAME_PREFIX)},
        text_prompt=str(trial.user_attrs.get("text_prompt", "")),
    )


def _untrained_points(
    trials: Iterable[FrozenTrial], space: PromptSpace, *, lower_is_better: bool
) -> Iterator[HistoryPoint]:
    known: list[tuple[int, Literal["candidate", "projection"], TokenIds, float | None]] = []
    for trial in trials:
        proposal = records.load(trial, "proposal", records.ProposalRecord)
        for candidate in proposal.candidates if proposal else ():
            known.append((trial.number, "candidate", candidate.token_ids, candidate.score))
        trajectory = records.load_trajectory(trial)
        # The loss of projected words is comparable with the study's value if that is a loss.
        for point in trajectory.points if trajectory and lower_is_better else ():
            known.append((trial.number, "projection", point.token_ids, point.hard_loss))
    for number, kind, token_ids, value in known:
        if value is not None and space.is_prompt(token_ids):
            yield HistoryPoint(space.from_token_ids(token_ids), kind, number, value)
