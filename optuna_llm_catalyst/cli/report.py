"""A study as rows, tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import optuna
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.table import Table

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.schema import encode


#: How the columns of the table look; a table without room for their least widths is no table.
_COLUMNS: dict[str, dict[str, Any]] = {
    "#": {"justify": "right", "min_width": 4, "no_wrap": True},
    "restart prompt": {"ratio": 1, "min_width": 16, "overflow": "fold"},
    "origin": {"min_width": 8},
    "text prompt": {"min_width": 7, "width": 7},
    "settings": {"min_width": 14},
}
_FIGURES: dict[str, Any] = {"justify": "right", "min_width": 11}
_BORDER = 3
#: What studies optimise unless their records say something else.
_LOSS = "loss"
#: How a stage that trains a text prompt says so.
_TRAINED = "trained here"


@dataclass(frozen=True)
class _Stage:
    """What a report needs of the record of how a stage ran."""

    settings: dict[str, Any]
    text_prompt: int | None = None
    refined_from: int | None = None
    metric: str = _LOSS


@dataclass(frozen=True)
class StageRow:
    """One stage, as the tables show it; None for what was not recorded.

    ``metric`` says what its value is, ``direction`` whether the study minimizes or maximizes it.
    """

    number: int
    prompt: str
    origin: str
    text_prompt: str
    state: str
    metric: str
    direction: str
    value_before: float | None
    value: float | None
    loss_before: float | None
    loss: float | None
    accuracy_before: float | None
    accuracy: float | None
    forward_sequences: int | None
    backward_passes: int | None
    settings: dict[str, Any]


def stage_rows(study: optuna.Study) -> list[StageRow]:
    """The stages of a study in the order of their numbers, waiting ones left out."""
    trials = [t for t in records.all_trials(study) if t.state != TrialState.WAITING]
    found = filter(None, (records.load(trial, "stage", _Stage) for trial in reversed(trials)))
    direction = study.direction.name.lower()
    metric = next((stage.metric for stage in found), _LOSS)
    return [_row(trial, metric, direction) for trial in trials]


def stage_row(study: optuna.Study, number: int | None) -> StageRow:
    """One stage; without a number the chosen one."""
    rows = stage_rows(study)
    found = chosen(rows) if number is None else next((r for r in rows if r.number == number), None)
    if found is None:
        what = "complete stage" if number is None else f"stage {number}"
        raise output.UserError(
            f"study {study.study_name!r} has no {what}; it has {len(rows)} stages."
        )
    return found


def chosen(rows: Sequence[StageRow]) -> StageRow | None:
    """The stage of the best value, of equal ones that of the lowest loss, as the study has it.

    None before the first complete stage.
    """

    def rank(row: StageRow) -> tuple[float, float, int]:
        value, loss = row.value or 0.0, math.inf if row.loss is None else row.loss
        return -value if row.direction == "maximize" else value, loss, row.number

    complete = [row for row in rows if row.state == "complete" and row.value is not None]
    return min(complete, key=rank, default=None)


def settings_to_compare(trial: FrozenTrial) -> dict[str, Any]:
    """The settings of a stage; empty if it trained a text prompt or continued another stage."""
    found = records.load(trial, "stage", _Stage)
    if found is None or found.refined_from is not None or found.text_prompt == trial.number:
        return {}
    return found.settings


def budget_of(trial: BaseTrial) -> int | None:
    """The steps or queries that a stage may spend, if its record says so."""
    found = records.load(trial, "stage", _Stage)
    settings = found.settings if found else {}
    budget = settings.get("n_steps", settings.get("n_queries"))
    return budget if isinstance(budget, int) else None


def listed(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def figure(value: float | None, form: str, before: float | None = None) -> str:
    """A figure, after the one before training if that is known."""
    if value is None:
        return "–"
    return f"{value:{form}}" if before is None else f"{before:{form}}→{value:{form}}"


def told(metric: str, value: float | None, before: float | None = None) -> str:
    """A value of a metric, after the one before training if that is known."""
    return figure(value, ".1%" if metric == "accuracy" else ".3f", before)


def document(study: optuna.Study, rows: Sequence[StageRow]) -> dict[str, Any]:
    """The stages for machines."""
    best = chosen(rows)
    return {
        "study": study.study_name,
        "metric": rows[0].metric if rows else None,
        "direction": study.direction.name.lower(),
        "stages": rows,
        "chosen": best and best.number,
    }


def stages(rows: Sequence[StageRow]) -> list[str | Table]:
    """The stages as a table, or a line each where a table has no room."""
    best, shown = chosen(rows), _cells(rows)
    if not shown:
        return ["There is no stage yet."]
    columns = {name: _COLUMNS.get(name, _FIGURES) for name in shown[0]}
    if output.width() <= sum(column["min_width"] + _BORDER for column in columns.values()):
        return [_line(cells) for cells in shown]
    title = f"Stages by {rows[0].metric} (validation, before training → after)"
    table = Table(title=title, title_justify="left")
    for name, column in columns.items():
        table.add_column(name, **column)
    for row, cells in zip(rows, shown, strict=True):
        table.add_row(*map(output.cell, cells.values()), style="bold" if row == best else "")
    return [table]


def _cells(rows: Sequence[StageRow]) -> list[dict[str, str]]:
    """What the table shows of each stage, by the names of its columns."""
    best, settings = chosen(rows), _different_settings(rows)
    has_settings, has_texts = any(settings), len({row.text_prompt for row in rows} - {""}) > 1
    return [
        {
            "#": f"{'* ' if row == best else ''}{row.number}",
            "restart prompt": row.prompt,
            "origin": row.origin,
            **({"text prompt": row.text_prompt} if has_texts else {}),
            **({"settings": differing} if has_settings else {}),
            **_figures(row),
        }
        for row, differing in zip(rows, settings, strict=True)
    ]


def _figures(row: StageRow) -> dict[str, str]:
    """The figures of a stage by name: what the study optimises, and one beside it."""
    cells = {row.metric: told(row.metric, row.value, row.value_before)}
    if row.metric == "accuracy":
        cells["loss"] = told("loss", row.loss, row.loss_before)
    else:
        cells["accuracy"] = told("accuracy", row.accuracy, row.accuracy_before)
    if row.state != "complete":
        cells[row.metric] += f" ({row.state})"
    return cells


def _line(cells: dict[str, str]) -> str:
    number, prompt, origin, *others = cells.items()
    rest = ", ".join(f"{name} {text}" for name, text in others if text)
    return f"{number[1]} {prompt[1]} ({origin[1]}, {rest})"


def _different_settings(rows: Sequence[StageRow]) -> list[str]:
    """For each stage the settings that not all stages of its kind share."""
    kinds: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row.settings)
    differ = {kind: _differing([each for each in known if each]) for kind, known in kinds.items()}
    return [
        listed({name: row.settings[name] for name in row.settings if name in differ[_kind(row)]})
        for row in rows
    ]


def _kind(row: StageRow) -> tuple[bool, bool]:
    """Stages that train a text prompt, or refine, have settings of their own."""
    return row.text_prompt == _TRAINED, row.origin == "refine"


def _differing(settings: Sequence[dict[str, Any]]) -> set[str]:
    """The names whose values are not the same in all of some settings."""
    names = {name for each in settings for name in each}
    return {name for name in names if len({repr(each.get(name)) for each in settings}) > 1}


def _row(trial: FrozenTrial, metric: str, direction: str) -> StageRow:
    trajectory = records.load_trajectory(trial)
    start = trajectory.points[0] if trajectory and trajectory.points else None
    attrs = trial.user_attrs
    # Somebody else may have written over a number.
    numbers = {name: value for name, value in attrs.items() if type(value) in (int, float)}
    found = records.load(trial, "stage", _Stage)
    value = encode(trial.value) if trial.state.is_finished() else None
    reported = trial.intermediate_values
    return StageRow(
        number=trial.number,
        prompt=str(attrs.get("prompt", "")),
        origin=str(attrs.get("origin", "")),
        text_prompt=str(attrs.get("text_prompt", "")),
        state=trial.state.name.lower(),
        metric=metric,
        direction=direction,
        value_before=encode(reported[min(reported)]) if reported else None,
        value=value,
        loss_before=encode(start.loss) if start else None,
        loss=value if metric == _LOSS else numbers.get("loss"),
        accuracy_before=start.accuracy if start else None,
        accuracy=numbers.get("accuracy"),
        forward_sequences=numbers.get("forward_sequences"),
        backward_passes=numbers.get("backward_passes"),
        settings=found.settings if found else {},
    )
