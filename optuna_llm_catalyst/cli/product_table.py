"""The table at the end of ``tune``: the study's product beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.prompt_tuning.comparison import Row
from optuna_llm_catalyst.prompt_tuning.significance import Interval


#: Below it a table's columns have no room.
_MIN_TABLE_WIDTH = 72
_HEADINGS = ("", "{metric}", "95 % interval", "{product} minus it", "which is")


def parts(rows: Sequence[Row], *, product: str, metric: str, n_examples: int) -> list[str | Table]:
    """The table for a terminal; lines where it has no room."""
    title = f"On {n_examples} test examples, which chose nothing"
    headings = [heading.format(metric=metric, product=product) for heading in _HEADINGS]
    cells = [row_cells(row) for row in rows]
    if output.width() < _MIN_TABLE_WIDTH:
        return [f"{title}: {metric}", *(_line(each, product) for each in cells)]
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position in (0, 4) else "right")
    for row, each in zip(rows, cells, strict=True):
        table.add_row(*map(output.cell, each), style="bold" if row.name == product else "")
    return [table]


def markdown(rows: Sequence[Row], *, product: str, metric: str) -> str:
    """The table for a model card."""
    headings = [heading.format(metric=metric, product=product) for heading in _HEADINGS]
    lines = [headings, ["---", *["---:"] * 3, "---"], *map(row_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row_cells(row: Row) -> list[str]:
    """Name, score, its interval, the product's lead with its interval, and what that means."""
    score = f"{row.score.value:.1%}"
    within = f"{row.score.low:.1%} to {row.score.high:.1%}"
    if row.difference is None:
        return [row.name, score, within, "", ""]
    return [row.name, score, within, _points(row.difference), row.verdict]


def _points(lead: Interval) -> str:
    low, value, high = (100 * number for number in (lead.low, lead.value, lead.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _line(cells: Sequence[str], product: str) -> str:
    name, score, within, lead, verdict = cells
    compared = f"; {product} minus it {lead}: {verdict}" if lead else ""
    return f"{name}: {score} ({within}){compared}"
