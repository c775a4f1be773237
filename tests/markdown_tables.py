"""The tables of the pages under docs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import re


DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Table:
    """A table: its heading's first cell, and its rows, as the text of their cells."""

    name: str
    rows: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """What stands between backticks in the first column."""
        return [name for row in self.rows for name in re.findall(r"`([^`]+)`", row[0])]


def tables(page: str) -> list[Table]:
    """The tables of a page, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, _, *rows = (_cells(line) for line in block.splitlines())
        found.append(Table(heading[0], tuple(rows)))
    return found


def table(page: str, name: str) -> Table:
    """The one table of a page with such a heading."""
    (found,) = (table for table in tables(page) if table.name == name)
    return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
