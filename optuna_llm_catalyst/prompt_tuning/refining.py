"""A long last stage that continues the best one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.schema import encode


@dataclass(frozen=True)
class Refinement:
    """The stage that another one continues, and for how long.

    Attributes:
        refined_from: The number of its trial.
        budget: What may be spent on it, in the stage's own unit.
        patience: Evaluations in a row without a better one after which it ends; None to spend
            the whole budget.
    """

    refined_from: int
    budget: int
    patience: int | None = None


def load(trial: BaseTrial) -> Refinement | None:
    """What a trial refines; None if it is a stage of its own."""
    return records.load(trial, "refinement", Refinement)


def run(
    objective: Callable[[BaseTrial], float],
    study: optuna.Study,
    best: FrozenTrial,
    refinement: Refinement,
) -> FrozenTrial:
    """Runs an objective on a new trial that refines the best one, and returns it finished."""
    attrs = {"origin": "refine", "refined_from": best.number}
    trial = records.start_trial(study, best.params, best.distributions, attrs)
    try:
        records.save(trial, "refinement", encode(refinement))
        value = objective(trial)
    except optuna.TrialPruned:
        return study.tell(trial, state=TrialState.PRUNED)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    return study.tell(trial, value)


def told(study: optuna.Study, trial: FrozenTrial) -> str:
    """What refining came to, in a line: ``trial`` is the one that refined another."""
    refinement, stage = load(trial), records.load(trial, "stage", StageRecord)
    if refinement is None or stage is None:
        return f"Trial {trial.number} refines no other."
    before, spent = records.all_trials(study)[refinement.refined_from].value, trial.last_step
    unit = "queries" if "n_queries" in stage.settings else "steps"
    if _is_better(study, trial.value, before):
        return (
            f"Refined stage {refinement.refined_from} from {stage.metric} {before:.3f} to "
            f"{trial.value:.3f} in {spent} of {refinement.budget} {unit}."
        )
    return (
        f"Refining stage {refinement.refined_from} did not help, stopped after {spent} of "
        f"{refinement.budget} {unit}."
    )


def _is_better(study: optuna.Study, value: float | None, before: float | None) -> bool:
    if value is None or before is None:
        return False
    return value < before if study.direction == StudyDirection.MINIMIZE else value > before
