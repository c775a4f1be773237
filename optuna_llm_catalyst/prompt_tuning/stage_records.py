"""How a stage ran, on its trial: its settings, its model, its metric, what it continues."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import is_dataclass
from typing import Any

from optuna.trial import BaseTrial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning.metrics import LOSS
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.schema import encode


@dataclass(frozen=True)
class ModelRecord:
    """Which frozen model a stage ran on."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class StageRecord:
    """How a stage ran.

    Attributes:
        settings: Its settings and those of its model.
        model: The frozen model.
        text_prompt: The trial whose text prompt stood before the texts; None for plain texts.
        refined_from: The trial whose stage it continued, if it did.
        metric: What the trial's value is.
        prompt_kind: The kind of prompt on the model's usual side.
    """

    settings: dict[str, Any]
    model: ModelRecord
    text_prompt: int | None = None
    refined_from: int | None = None
    metric: str = LOSS.name
    prompt_kind: str = SOFT.name


def settings_of(stage: Stage, model: TaskModel) -> dict[str, Any]:
    """What changes the value of a stage: its own fields or budget, and the model's settings."""
    fields = encode(stage) if is_dataclass(stage) else {"budget": stage.budget}
    fields = records.jsonable(fields)  # They may be those of somebody else's stage.
    return {"stage": type(stage).__name__, **fields, **model.settings}


def record_stage(
    trial: BaseTrial,
    stage: Stage,
    model: TaskModel,
    text_prompt: int | None,
    refined_from: int | None,
    metric: Metric,
    kind: PromptKind = SOFT,
) -> None:
    """Leaves on a running trial how its stage runs."""
    known, settings = ModelRecord(model.name, model.fingerprint), settings_of(stage, model)
    record = StageRecord(settings, known, text_prompt, refined_from, metric.name, kind.name)
    records.save(trial, "stage", encode(record))
