"""A study as rows, tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.table import Table
from rich.text import Text

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.trajectory import finite_or_none


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


def chosen(rows: Sequence[StageRow]) -> StageRow | None:
    """The stage of the lowest validation loss; None before the first complete stage."""
    complete = [row for row in rows if row.state == "complete" and row.loss is not None]
    return min(complete, key=lambda row: (row.loss or 0.0, row.number), default=None)


def first(rows: Sequence[StageRow]) -> StageRow | None:
    """The first stage that was completed: what prompt tuning without restarts comes to."""
    return next((row for row in rows if row.state == "complete"), None)


def stage_settings(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The settings with which a stage was trained; empty if they were not recorded."""
    found = records.load(trial, "stage", _Stage)
    return found.settings if found else {}


def listed(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def print_stages(rows: Sequence[StageRow]) -> None:
    """Prints the stages as a table, or a line each where a table has no room."""
    if output.width() >= _MIN_TABLE_WIDTH:
        output.print_table(_table(rows))
        return
    best = chosen(rows)
    for row in rows:
        loss, accuracy = _figures(row)
        facts = f"{row.origin}, loss {loss}, accuracy {accuracy}"
        output.tell(f"{_number(row, best)} {row.prompt} ({facts})")


def _table(rows: Sequence[StageRow]) -> Table:
    best, settings = chosen(rows), _different_settings(rows)
    table = Table(title="Stages (validation, before training → after)", title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("restart prompt", ratio=1, min_width=12, overflow="fold")
    table.add_column("origin")
    if settings:
        table.add_column("settings")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    for row, differing in zip(rows, settings or [""] * len(rows), strict=True):
        # As `Text`, not as markup.
        texts = [row.prompt, row.origin, *([differing] if settings else [])]
        table.add_row(
            _number(row, best),
            *(Text(output.printable(text)) for text in texts),
            *_figures(row),
            style="bold" if row == best else "",
        )
    return table


def _number(row: StageRow, best: StageRow | None) -> str:
    return f"{'* ' if row == best else ''}{row.number}"


def _figures(row: StageRow) -> tuple[str, str]:
    loss = _arrow(row.loss_before, row.loss, ".3f")
    return (
        loss if row.state == "complete" else f"{loss} ({row.state})",
        _arrow(row.accuracy_before, row.accuracy, ".1%"),
    )


def _different_settings(rows: Sequence[StageRow]) -> list[str]:
    """For each stage the settings that not all stages share; empty if all share all."""
    known = [row.settings for row in rows if row.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    differ = [n for n in names if len({repr(settings.get(n)) for settings in known}) > 1]
    if not differ:
        return []
    return [listed({n: row.settings[n] for n in differ if n in row.settings}) for row in rows]


def _row(trial: optuna.trial.FrozenTrial) -> StageRow:
    trajectory = records.load_trajectory(trial)
    start = trajectory.points[0] if trajectory and trajectory.points else None
    attrs = trial.user_attrs
    return StageRow(
        number=trial.number,
        prompt=str(attrs.get("prompt", "")),
        origin=str(attrs.get("origin", "")),
        state=trial.state.name.lower(),
        loss_before=finite_or_none(start.loss) if start else None,
        loss=finite_or_none(trial.value) if trial.state.is_finished() else None,
        accuracy_before=start.accuracy if start else None,
        accuracy=_known(attrs.get("accuracy"), float),
        forward_sequences=_known(attrs.get("forward_sequences"), int),
        backward_passes=_known(attrs.get("backward_passes"), int),
        settings=stage_settings(trial),
    )


def _known(value: Any, kind: type[float]) -> Any:
    """A number that somebody else may have written over."""
    return value if isinstance(value, int | kind) and not isinstance(value, bool) else None


def _arrow(before: float | None, after: float | None, form: str) -> str:
    if after is None:
        return "–"
    return f"{after:{form}}" if before is None else f"{before:{form}} → {after:{form}}"
