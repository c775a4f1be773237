"""A study as rows, tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.table import Table

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.schema import encode


#: Below it a table's columns leave no room for the prompt.
_MIN_TABLE_WIDTH = 72


@dataclass(frozen=True)
class _Stage:
    """What a report needs of the record of how a stage ran."""

    settings: dict[str, Any]


@dataclass(frozen=True)
class StageRow:
    """One stage, as the tables show it; None for what was not recorded."""

    number: int
    prompt: str
    origin: str
    state: str
    loss_before: float | None
    loss: float | None
    accuracy_before: float | None
    accuracy: float | None
    forward_sequences: int | None
    backward_passes: int | None
    settings: dict[str, Any]


def stage_rows(study: optuna.Study) -> list[StageRow]:
    """The stages of a study in the order of their numbers, waiting ones left out."""
    return [_row(t) for t in records.all_trials(study) if t.state != TrialState.WAITING]


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
    """The stage of the lowest validation loss; None before the first complete stage."""
    complete = [row for row in rows if row.state == "complete" and row.loss is not None]
    return min(complete, key=lambda row: (row.loss or 0.0, row.number), default=None)


def stage_settings(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The settings with which a stage was trained; empty if they were not recorded."""
    found = records.load(trial, "stage", _Stage)
    return found.settings if found else {}


def listed(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def figure(value: float | None, form: str, before: float | None = None) -> str:
    """A figure, after the one before training if that is known."""
    if value is None:
        return "–"
    return f"{value:{form}}" if before is None else f"{before:{form}} → {value:{form}}"


def document(study: optuna.Study, rows: Sequence[StageRow]) -> dict[str, Any]:
    """The stages for machines."""
    best = chosen(rows)
    return {"study": study.study_name, "stages": rows, "chosen": best and best.number}


def stages(rows: Sequence[StageRow]) -> list[str | Table]:
    """The stages as a table, or a line each where a table has no room."""
    best, shown = chosen(rows), []
    for row, differing in zip(rows, _different_settings(rows), strict=True):
        loss = figure(row.loss, ".3f", row.loss_before)
        shown.append(
            {
                "#": f"{'* ' if row == best else ''}{row.number}",
                "restart prompt": row.prompt,
                "origin": row.origin,
                "settings": differing,
                "loss": loss if row.state == "complete" else f"{loss} ({row.state})",
                "accuracy": figure(row.accuracy, ".1%", row.accuracy_before),
            }
        )
    if output.width() < _MIN_TABLE_WIDTH:
        line = "{#} {restart prompt} ({origin}, loss {loss}, accuracy {accuracy})"
        return [line.format_map(cells) for cells in shown]
    table = Table(title="Stages (validation, before training → after)", title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("restart prompt", ratio=1, min_width=12, overflow="fold")
    table.add_column("origin")
    if any(cells["settings"] for cells in shown):
        table.add_column("settings")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    for row, cells in zip(rows, shown, strict=True):
        texts = [output.cell(cells[str(column.header)]) for column in table.columns]
        table.add_row(*texts, style="bold" if row == best else "")
    return [table]


def _different_settings(rows: Sequence[StageRow]) -> list[str]:
    """For each stage the settings that not all stages share."""
    known = [row.settings for row in rows if row.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    differ = [n for n in names if len({repr(settings.get(n)) for settings in known}) > 1]
    return [listed({n: row.settings[n] for n in differ if n in row.settings}) for row in rows]


def _row(trial: optuna.trial.FrozenTrial) -> StageRow:
    trajectory = records.load_trajectory(trial)
    start = trajectory.points[0] if trajectory and trajectory.points else None
    attrs = trial.user_attrs
    # Somebody else may have written over a number.
    numbers = {name: value for name, value in attrs.items() if type(value) in (int, float)}
    return StageRow(
        number=trial.number,
        prompt=str(attrs.get("prompt", "")),
        origin=str(attrs.get("origin", "")),
        state=trial.state.name.lower(),
        loss_before=encode(start.loss) if start else None,
        loss=encode(trial.value) if trial.state.is_finished() else None,
        accuracy_before=start.accuracy if start else None,
        accuracy=numbers.get("accuracy"),
        forward_sequences=numbers.get("forward_sequences"),
        backward_passes=numbers.get("backward_passes"),
        settings=stage_settings(trial),
    )
