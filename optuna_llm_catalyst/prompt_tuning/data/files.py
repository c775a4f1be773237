"""Files to tables: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
import csv
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any
from typing import Literal

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning.data.tables import Table
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError
from optuna_llm_catalyst.schema import T


@dataclass(frozen=True)
class _Feature:
    names: list[str] | None = None


@dataclass(frozen=True)
class _Info:
    features: dict[str, _Feature]


@dataclass(frozen=True)
class _HubMetadata:
    """What the library ``datasets`` writes into Parquet beside the columns."""

    info: _Info


def read_table(path: Path) -> Table:
    """Reads a file as its suffix says.

    Raises:
        DataError: Names the file, the line, what is wrong and what to do.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: its kind is not known by its name; files of these kinds are read: "
            f"{', '.join(SUFFIXES)}."
        )
    table = read(path)
    if not table.n_rows:
        raise DataError(f"{path}: there is no example in it: add some, or remove the file.")
    return table


def read_text(path: Path) -> str | None:
    """The text of a file, None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def parse_json(kind: type[T], text: str, where: str, problem: str) -> T:
    """Reads JSON as a type; ``problem`` is what to say of a text that is no JSON."""
    try:
        return decode(kind, json.loads(text))
    except SchemaError as error:
        raise DataError(f"{where}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {problem}: {first_line(error)}.") from error


def _read_json_lines(path: Path) -> Table:
    lines = {f"{path}:{i}": line for i, line in enumerate(_lines(path), 1) if line.strip()}
    rows = {
        where: parse_json(dict[str, Any], line, where, "not a line of JSON")
        for where, line in lines.items()
    }
    names = tuple(dict.fromkeys(name for row in rows.values() for name in row))

    def column(name: str) -> list[Any]:
        return [row.get(name) for row in rows.values()]

    return Table(str(path), names, len(rows), column, list(rows).__getitem__)


def _read_csv(path: Path) -> Table:
    # Spreadsheets of some countries write semicolons.
    delimiter = max(",;\t", key=_lines(path)[0].count)
    return _read_separated(path, delimiter, csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Table:
    """Some write quotes around values, to many a quote is a character as any other."""
    try:
        quoted = _read_separated(path, "\t", csv.QUOTE_MINIMAL)
    except DataError:
        return _read_separated(path, "\t", csv.QUOTE_NONE)
    try:
        plain = _read_separated(path, "\t", csv.QUOTE_NONE)
    except DataError:  # Values hold tabs or line breaks.
        return quoted
    # Quotes of two rows that were taken for one pair would swallow what is between them.
    return quoted if quoted.n_rows == plain.n_rows else plain


def _read_separated(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Table:
    lines = [f"{line}\n" for line in _lines(path)]
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    rows: dict[str, list[str]] = {}
    start = 1
    try:
        for values in reader:
            if values:
                rows[f"{path}:{start}"] = values
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: cannot be read: {error}. A value that starts with a quote must end "
            "with one; quotes inside are written twice."
        ) from error
    header, places = next(iter(rows.values()), []), list(rows)[1:]
    names = tuple(name.strip() for name in header)
    for where in places:
        if len(rows[where]) != len(names):
            raise DataError(
                f"{where}: {len(rows[where])} values for the {len(names)} columns of the first "
                f"line: put quotes around values that hold {delimiter!r} or a line break."
            )

    def column(name: str) -> list[str]:
        return [rows[where][names.index(name)] for where in places]

    return Table(str(path), names, len(places), column, places.__getitem__, is_text=True)


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path}: pyarrow, which reads Parquet, is not installed: pip install "
            "'optuna-llm-catalyst[datasets]', or save the file as CSV."
        ) from error
    with _parquet_errors(path), ParquetFile(path) as file:
        found = file.read()

    def column(name: str) -> list[Any]:
        with _parquet_errors(path):
            values: list[Any] = found.column(name).to_pylist()
            return values

    return Table(
        str(path),
        tuple(found.column_names),
        found.num_rows,
        column,
        lambda row: f"{path}[{row}]",
        _class_names(found.schema.metadata or {}),
    )


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {first_line(error)}.") from error


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes that the library ``datasets`` left in a file; others leave none."""
    try:
        found = decode(_HubMetadata, json.loads(metadata.get(b"huggingface", b"")))
    except (ValueError, RecursionError):
        return {}
    return {name: feature.names for name, feature in found.info.features.items() if feature.names}


def _lines(path: Path) -> list[str]:
    return (read_text(path) or "").split("\n")


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
#: Files that can be read.
SUFFIXES = tuple(_READERS)
