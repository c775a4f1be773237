"""Texts from a file or a stream, a row at a time: JSON lines, CSV and TSV."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import csv
from dataclasses import dataclass
from itertools import chain
import json
from typing import Any

from optuna_llm_catalyst.cli.output import UserError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.text_inputs import read_text


#: The key of a row that goes over into its prediction.
ID = "id"


@dataclass(frozen=True)
class Columns:
    """Where a row has its text, and its second text if it has one."""

    text: str
    text_pair: str


@dataclass(frozen=True)
class TextRow:
    """A text with what its prediction is found by.

    Attributes:
        where: Its file and line.
        example: The text, or the pair.
        kept: The row's ``id``, if it has one.
    """

    where: str
    example: Example
    kept: Mapping[str, Any]

    @property
    def text(self) -> str | tuple[str, str]:
        """The text, or the pair, as a classifier takes it."""
        text, pair = self.example.text, self.example.text_pair
        return text if pair is None else (text, pair)


def json_rows(lines: Iterable[bytes], name: str, columns: Columns) -> Iterator[TextRow]:
    """Reads a JSON object or a JSON text from each line; blank lines are passed over.

    Raises:
        UserError: Names the first line that is neither.
    """
    for number, line in enumerate(_decoded(lines, name), 1):
        if line.strip():
            where = f"{name}:{number}"
            yield _row(_object(line, where, columns), where, columns)


def table_rows(
    lines: Iterable[bytes], name: str, columns: Columns, delimiters: str
) -> Iterator[TextRow]:
    """Reads the rows of a table whose first line names its columns.

    Args:
        lines: Its lines.
        name: What errors call it.
        columns: Which columns are read.
        delimiters: What may stand between values; the one that is most often in the first line.

    Raises:
        UserError: Names the first line that cannot be read.
    """
    texts = _decoded(lines, name)
    first = next(texts, "")
    delimiter = max(delimiters, key=first.count)
    reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for values in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not values:
                continue
            if header:
                yield _row(_cells(header, values, where), where, columns)
            else:
                header = _header(values, where, columns)
    except csv.Error as error:
        problem = str(error).replace("\t", "\\t")
        raise UserError(
            f"{name}:{start}: cannot be read: {problem}. A value that starts with a quote must "
            "end with one; quotes inside are written twice."
        ) from error


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: cannot be read: {error}. Use UTF-8.") from error


def _object(line: str, where: str, columns: Columns) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a row of JSON: {first_line(error)}.") from error
    if isinstance(value, str):
        return {columns.text: value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object or a text, got {line.strip()[:80]}.")
    return value


def _header(values: list[str], where: str, columns: Columns) -> list[str]:
    names = [name.strip() for name in values]
    if columns.text not in names:
        raise UserError(
            f"{where}: there is no column {columns.text!r}, only {', '.join(map(repr, names))}: "
            "say which it is with --text-column."
        )
    return names


def _cells(header: list[str], values: list[str], where: str) -> dict[str, str]:
    if len(values) != len(header):
        raise UserError(
            f"{where}: {len(values)} values for the {len(header)} columns of the first line: put "
            "quotes around values that hold a delimiter or a line break."
        )
    return dict(zip(header, values, strict=True))


def _row(values: Mapping[str, Any], where: str, columns: Columns) -> TextRow:
    if columns.text not in values:
        raise UserError(f"{where}: there is no {columns.text!r}: name another with --text-column.")
    text, pair = values[columns.text], values.get(columns.text_pair)
    try:
        # An empty cell or null is no second text, as in the data of tune.
        example = read_text((text, pair) if pair else text, f"its {columns.text}")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return TextRow(where, example, {ID: values[ID]} if ID in values else {})
