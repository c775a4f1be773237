"""Tables to examples: which columns, and what their values mean.

A table is anything with named columns. What a file, a frame or a data set of a library holds is
read here, in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import re
from typing import Any

import numpy as np

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning.data.task import half_character
from optuna_llm_catalyst.prompt_tuning.data.task import listed
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError


#: Columns that are taken where nothing is said; beside "text" and "label", which come first.
_TEXTS = ("sentence", "content", "review", "message", "comment", "tweet", "utterance")
_LABELS = ("labels", "class", "category", "target", "sentiment", "intent", "topic")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(?:\.0+)?")
#: The label of a row that has none, where labels are numbers.
_NO_LABEL = -1
_LABEL: Any = str | int


@dataclass(frozen=True)
class Table:
    """Columns, and what messages call their rows.

    Attributes:
        name: What messages call the table.
        names: Names of its columns.
        n_rows: How many rows it has.
        column: The values of a column.
        place: What messages call a row.
        class_names: By column, names of which the values are indices.
        is_text: Whether all values are texts, as in CSV: numbers are read from them.
    """

    name: str
    names: tuple[str, ...]
    n_rows: int
    column: Callable[[str], Sequence[Any]]
    place: Callable[[int], str]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_text: bool = False


@dataclass(frozen=True)
class NamedColumns:
    """The columns that somebody named; None: not named."""

    text: str | None = None
    label: str | None = None
    text_pair: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    text: str
    label: str
    text_pair: str | None


@dataclass(frozen=True)
class Row:
    """A row that has been read; a label is a name, or a whole number."""

    where: str
    text: str
    label: str | int
    text_pair: str | None


def choose_columns(tables: Sequence[Table], named: NamedColumns) -> tuple[Columns, list[str]]:
    """The columns to read, and what was guessed of them.

    Raises:
        DataError: If a named column is not there, or none or more than one could be meant.
    """
    where, names = tables[0].name, tuple(dict.fromkeys(n for table in tables for n in table.names))
    for name in (named.text, named.label, named.text_pair):
        if name is not None and name not in names:
            raise _no_column(where, name, names)
    # The exact name last: it counts more than the same in other letters.
    folded = {name.strip().lower(): name for name in names} | {name: name for name in names}
    text, pair = named.text, named.text_pair or folded.get("text_pair")
    if text is None:
        text, guessed = _guess(where, folded, "text", _TEXTS)
        pair = pair or guessed
    label = named.label or _guess(where, folded, "label", _LABELS)[0]
    chosen = Columns(text, label, pair)
    guesses = [
        f"{role} = {name!r}"
        for role, name in vars(chosen).items()
        if name not in (None, role, getattr(named, role))
    ]
    return chosen, [f"Columns were guessed: {', '.join(guesses)}."] if guesses else []


def read_rows(table: Table, columns: Columns, *, strict: bool) -> tuple[list[Row], list[str]]:
    """The rows of a table, and what was dropped.

    Args:
        table: The table.
        columns: Which columns to read; the table may lack the one of second texts.
        strict: Whether a row without a text, and a label that is true, false or a fraction, are
            errors. Otherwise such a row is dropped, and such a label is a name.

    Raises:
        DataError: Names the row, what is wrong and what to do.
    """
    texts, labels = _column(table, columns.text), _column(table, columns.label)
    pairs: Sequence[Any] = [None] * table.n_rows
    if columns.text_pair in table.names:
        pairs = _column(table, columns.text_pair)
    rows: list[Row] = []
    blank: list[str] = []
    for i, values in enumerate(zip(texts, labels, pairs, strict=True)):
        text, label, pair = map(_plain, values)
        if _is_blank(text) and not strict:
            blank.append(table.place(i))
            continue
        try:
            second = None if _is_blank(pair) else _read_text(pair, columns.text_pair or "")
            first = _read_text(text, columns.text)
            label = _read_label(table, label, columns.label, strict=strict)
        except SchemaError as error:
            raise DataError(f"{table.place(i)}: {error}.") from error
        rows.append(Row(table.place(i), first, label, second))
    if not rows:
        raise DataError(f"{table.name}: there is no example in it: add some, or leave it away.")
    if not blank:
        return rows, []
    return rows, [f"Rows without a text were dropped: {len(blank)}, the first is {blank[0]}."]


def is_labelled(table: Table, columns: Columns) -> bool:
    """Whether any row of a table, if it has rows, has a label: test splits may have none."""
    if columns.label not in table.names:
        return False
    labels = [_plain(label) for label in _column(table, columns.label)]
    return not labels or any(not _is_missing(label) and label != _NO_LABEL for label in labels)


def _guess(
    where: str, folded: Mapping[str, str], role: str, known: Sequence[str]
) -> tuple[str, str | None]:
    """The column of a role by its name, and the column of second texts that belongs to it."""
    if role in folded:
        return folded[role], None
    found: list[tuple[str, str | None]] = [
        (folded[name], None) for name in known if name in folded
    ]
    if role == "text":
        found += [(folded[a], folded[b]) for a, b in _PAIRS if {a, b} <= folded.keys()]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{where}: which column holds the {role}s? There are {_all(folded.values())}. Name it: "
        f"--{role} COLUMN, or {role}=... in Python."
    )


def _column(table: Table, name: str) -> Sequence[Any]:
    if table.names.count(name) != 1:
        raise _no_column(table.name, name, table.names)
    return table.column(name)


def _no_column(where: str, name: str, names: Sequence[str]) -> DataError:
    problem = "more than one" if name in names else "no"
    return DataError(f"{where}: there is {problem} column {name!r}; there are {_all(names)}.")


def _all(names: Iterable[str]) -> str:
    return listed([repr(name[:80]) for name in dict.fromkeys(names)])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA of pandas is neither equal nor unequal to anything.
        return True
    except ValueError:  # An array is a value, if a strange one.
        return False


def _is_blank(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else _is_missing(value)


def _read_text(value: Any, name: str) -> str:
    if _is_missing(value):
        raise SchemaError("is missing", name)
    text = value if type(value) is str else decode(str, value, at=name)
    if not text.strip():
        raise SchemaError("must not be empty", name)
    if half := half_character(text):
        raise SchemaError(half, name)
    return text


def _read_label(table: Table, value: Any, name: str, *, strict: bool) -> str | int:
    if table.is_text:
        value = _from_text(value)
    if _is_blank(value):
        raise SchemaError("is missing", name)
    if not strict and isinstance(value, bool | float):
        value = int(value) if isinstance(value, float) and value.is_integer() else str(value)
    # Most need no schema to tell, and there may be many.
    label: str | int = value if type(value) in (str, int) else decode(_LABEL, value, at=name)
    if half := half_character(str(label)):
        raise SchemaError(half, name)
    if isinstance(label, str):
        return label
    names = table.class_names.get(name)
    if names is None:
        return label
    if not 0 <= label < len(names):
        raise SchemaError(f"is {label}, which is none of 0 … {len(names) - 1}", name)
    return names[label]


def _from_text(text: str) -> str | int | None:
    """What a label in CSV is: a whole number, nothing, or a name without blanks around it."""
    text = text.strip()
    whole = _WHOLE.fullmatch(text)
    return int(whole[1]) if whole else text or None
