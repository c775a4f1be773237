"""A study as rows and tables. Pure, but for the reading of the study."""

from __future__ import annotations

from dataclasses import dataclass
import json
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.table import Table
from rich.text import Text

from optuna_llm_catalyst import records
from optuna_llm_catalyst.schema import encode


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


def printable(text: str) -> str:
    """The text without what a terminal would obey: an LLM or a server may have written it."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def print_json(document: Any) -> None:
    """Prints one JSON document; numbers that JSON does not know become null."""
    print(json.dumps(encode(document), allow_nan=False))


def stage_rows(study: optuna.Study) -> list[StageRow]:
    """The stages of a study in the order of their numbers, waiting ones left out."""
    return [_row(t) for t in records.all_trials(study) if t.state != TrialState.WAITING]


def chosen(rows: list[StageRow]) -> StageRow | None:
    """The stage of the lowest validation loss; None before the first complete stage."""
    complete = [row for row in rows if row.state == "complete" and row.loss is not None]
    return min(complete, key=lambda row: (row.loss or 0.0, row.number), default=None)


def first(rows: list[StageRow]) -> StageRow | None:
    """The first stage that was completed: what prompt tuning without restarts comes to."""
    return next((row for row in rows if row.state == "complete"), None)


def stage_table(rows: list[StageRow]) -> Table:
    """Stages with validation loss and accuracy before and after, the chosen one marked."""
    best = chosen(rows)
    table = Table(title="Stages (validation, before training → after)", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("restart prompt", ratio=1, overflow="fold")
    table.add_column("origin")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    for row in rows:
        is_best = best is not None and row.number == best.number
        loss = _arrow(row.loss_before, row.loss, ".3f")
        table.add_row(
            f"{'* ' if is_best else ''}{row.number}",
            Text(printable(row.prompt)),  # Not as markup.
            Text(printable(row.origin)),
            loss if row.state == "complete" else f"{loss} ({row.state})".strip(),
            _arrow(row.accuracy_before, row.accuracy, ".1%"),
            style="bold" if is_best else "",
        )
    return table


def _row(trial: optuna.trial.FrozenTrial) -> StageRow:
    trajectory = records.load_trajectory(trial)
    start = trajectory.points[0] if trajectory and trajectory.points else None
    return StageRow(
        number=trial.number,
        prompt=str(trial.user_attrs.get("prompt", "")),
        origin=str(trial.user_attrs.get("origin", "")),
        state=trial.state.name.lower(),
        loss_before=encode(start.loss) if start else None,
        loss=encode(trial.value) if trial.state.is_finished() else None,
        accuracy_before=start.accuracy if start else None,
        accuracy=trial.user_attrs.get("accuracy"),
        forward_sequences=trial.user_attrs.get("forward_sequences"),
        backward_passes=trial.user_attrs.get("backward_passes"),
    )


def _arrow(before: float | None, after: float | None, form: str) -> str:
    if after is None:
        return "–"
    return f"{after:{form}}" if before is None else f"{before:{form}} → {after:{form}}"
