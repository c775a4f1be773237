"""The table at the end of ``tune``: the study's product beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.prompt_tuning.comparison import Row
from optuna_llm_catalyst.prompt_tuning.significance import Interval


#: Below it a table's columns have no room.
_MIN_TABLE_WIDTH = 72
_HEADINGS = ("", "{metric}", "95 % interval", "lead", "in words")


def parts(rows: Sequence[Row], *, product: str, metric: str, n_examples: int) -> list[str | Table]:
    """The table for a terminal; lines where it has no room."""
    title = f"{n_examples} test examples, which chose nothing. {_lead(product)}"
    headings = [heading.format(metric=metric) for heading in _HEADINGS]
    cells = [row_cells(row) for row in rows]
    if output.width() < _MIN_TABLE_WIDTH:
        return [f"{title} {metric}:", *map(_line, cells)]
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        is_text = position in (0, len(headings) - 1)
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for row, each in zip(rows, cells, strict=True):
        table.add_row(*map(output.cell, each), style="bold" if row.name == product else "")
    return [table]


def markdown(rows: Sequence[Row], *, product: str, metric: str) -> str:
    """The table for a model card."""
    headings = [heading.format(metric=metric) for heading in _HEADINGS]
    lines = [headings, ["---", *["---:"] * 3, "---"], *map(row_cells, rows)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{table}\n{_lead(product)}\n"


def _lead(product: str) -> str:
    return f"Lead: the {product} minus the row, in points, with a 95 % interval."


def row_cells(row: Row) -> list[str]:
    """Name, score, its interval, the product's lead with its interval, and what that means."""
    score = f"{row.score.value:.1%}"
    within = f"{100 * row.score.low:.1f} … {100 * row.score.high:.1f}"
    if row.difference is None:
        return [row.name, score, within, "", ""]
    return [row.name, score, within, _points(row.difference), row.verdict]


def _points(lead: Interval) -> str:
    low, value, high = (100 * number for number in (lead.low, lead.value, lead.high))
    return f"{value:+.1f} ({low:+.1f} … {high:+.1f})"


def _line(cells: Sequence[str]) -> str:
    name, score, within, lead, verdict = cells
    return f"{name}: {score} ({within})" + (f"; lead {lead}, {verdict}" if lead else "")
