"""How a stage ran, on its trial: its settings, its model, and which stage it continues."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import is_dataclass
from typing import Any

from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import Trial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.stages import Stage


@dataclass(frozen=True)
class ModelRecord:
    """Which frozen model a stage ran on."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class StageRecord:
    """How a stage ran: its settings, and its model."""

    settings: dict[str, Any]
    model: ModelRecord


@dataclass(frozen=True)
class Refinement:
    """The stage that another one continues, and the budget for that."""

    refined_from: int
    budget: int


def settings_of(stage: Stage, model: TaskModel) -> dict[str, Any]:
    """What changes the value of a stage: its own fields or budget, and the model's settings."""
    fields = (
        asdict(stage)
        if is_dataclass(stage) and not isinstance(stage, type)
        else {"budget": stage.budget}
    )
    return {"stage": type(stage).__name__, **fields, **model.settings}


def record_stage(trial: BaseTrial, stage: Stage, model: TaskModel) -> None:
    """Leaves on a running trial how its stage runs."""
    record = StageRecord(settings_of(stage, model), ModelRecord(model.name, model.fingerprint))
    records.save(trial, "stage", asdict(record))


def load_stage(trial: BaseTrial | FrozenTrial) -> StageRecord | None:
    """How the stage of a trial ran; None if it does not say."""
    return records.load(trial, "stage", StageRecord)


def record_refinement(trial: BaseTrial, refinement: Refinement) -> None:
    """Leaves on a running trial which stage it continues."""
    records.save(trial, "refinement", asdict(refinement))


def load_refinement(trial: BaseTrial) -> Refinement | None:
    """Which stage a trial continues; None for one that starts from words."""
    return records.load(trial, "refinement", Refinement)


def check_model(trial: BaseTrial, model: TaskModel) -> None:
    """Checks that the study's other stages ran on the same model: else losses do not compare.

    Raises:
        StudyMismatchError: If the last of them that says so ran on another one.
    """
    if not isinstance(trial, Trial):
        return
    others = (t for t in reversed(records.all_trials(trial.study)) if t.number != trial.number)
    known = next(((t, r) for t in others if (r := load_stage(t))), None)
    if known is not None and known[1].model.fingerprint != model.fingerprint:
        other, record = known
        raise StudyMismatchError(
            f"Trial {other.number} ran on the model {record.model.name!r} (fingerprint "
            f"{record.model.fingerprint}), this one would run on {model.name!r} "
            f"({model.fingerprint}). Use the model of the study, or a new study name."
        )
