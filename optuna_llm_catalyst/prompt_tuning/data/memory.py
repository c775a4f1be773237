"""Texts and labels in memory to a task: lists, arrays, frames, and data sets of a library.

They are known by what they can do, so that none of their libraries is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning.data.assembly import Card
from optuna_llm_catalyst.prompt_tuning.data.assembly import make_task
from optuna_llm_catalyst.prompt_tuning.data.assembly import pick_splits
from optuna_llm_catalyst.prompt_tuning.data.tables import NamedColumns
from optuna_llm_catalyst.prompt_tuning.data.tables import Table
from optuna_llm_catalyst.prompt_tuning.data.task import listed
from optuna_llm_catalyst.prompt_tuning.data.task import Task


def task_from_texts(
    texts: Iterable[Any],
    labels: Iterable[Any],
    text_pairs: Iterable[Any] | None = None,
    *,
    validation: Sequence[Iterable[Any]] | None = None,
    test: Sequence[Iterable[Any]] | None = None,
    label_names: Sequence[str] | None = None,
    name: str = "task",
    description: str = "",
    seed: int = 0,
) -> Task:
    """Makes a task of texts and their labels: lists, NumPy arrays, columns of a frame.

    Alone they are split by label into 60 % to train, 20 % to validate and 20 % to test. With
    ``validation`` or ``test`` they are the training split, and a validation split is drawn from
    them if there is none. Rows without a text are dropped, and of the texts that are drawn from
    the repeated ones; ``task.notes`` counts them.

    Args:
        texts: The texts.
        labels: As many labels: texts, whole numbers, booleans or fractions. Each value is a
            label's name, unless ``label_names`` are given.
        text_pairs: As many second texts, for tasks on pairs.
        validation: Texts and labels, and second texts if there are, to validate.
        test: The same to test.
        label_names: Names that whole numbers are indices into. By default the labels of the
            training texts, in their order.
        name: Name of the task.
        description: What the task is, in a sentence.
        seed: Seed of the draw.

    Raises:
        DataError: Names the row, as ``train[3]``, what is wrong and what to do.
    """
    given = {"train": (texts, labels, text_pairs), "validation": validation, "test": test}
    tables = {
        split: _of_lists(split, parts) for split, parts in given.items() if parts is not None
    }
    named = NamedColumns("text", "label")
    card = Card(name, description, label_names)
    return make_task(tables, named, card, seed=seed, strict=False)


def task_from_table(
    table: Any,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    validation: Any = None,
    test: Any = None,
    label_names: Sequence[str] | None = None,
    name: str = "task",
    description: str = "",
    seed: int = 0,
) -> Task:
    """Makes a task of a table with named columns.

    A table is a DataFrame, a ``datasets.Dataset`` or a list of dicts. One alone is split, as by
    :func:`task_from_texts`; a ``DatasetDict``, or another mapping from ``train``, ``validation``
    and ``test`` to tables, holds several.

    Args:
        table: The table, or the tables by split.
        text: Column of the texts. By default ``text``, or the only one that is called like one.
        text_pair: Column of second texts, for tasks on pairs.
        label: Column of the labels. By default ``label``, or the only one that is called so.
        validation: A table to validate.
        test: A table to test.
        label_names: Names that whole numbers are indices into. By default those of a
            ``ClassLabel``, or the labels of the training rows in their order.
        name: Name of the task.
        description: What the task is, in a sentence.
        seed: Seed of the draw.

    Raises:
        DataError: Names the row, as ``train[3]``, what is wrong and what to do.
    """
    splits = dict(table) if isinstance(table, Mapping) else {"train": table}
    more = {"validation": validation, "test": test}
    splits |= {split: given for split, given in more.items() if given is not None}
    card = Card(name, description, label_names)
    return make_task(
        tables_of(splits), NamedColumns(text, label, text_pair), card, seed=seed, strict=False
    )


def tables_of(splits: Mapping[str, Any], where: str = "") -> dict[str, Table]:
    """Tables by split, of what a library calls splits; ``where`` is for messages.

    Raises:
        DataError: If there is no training split, or what is a split has no columns.
    """
    picked = pick_splits({name: name for name in splits}, where or "the table")
    if "train" not in picked:
        found = listed([str(name) for name in splits])
        raise DataError(f"{where or 'the table'}: there is no split train, there are: {found}.")
    return {
        split: _of_table(splits[name], f"{where} {name}".strip()) for split, name in picked.items()
    }


def _of_lists(split: str, parts: Sequence[Iterable[Any] | None]) -> Table:
    if not 2 <= len(parts) <= 3:
        raise DataError(f"`{split}` must be texts and labels, or with second texts, too.")
    named = zip(("text", "label", "text_pair"), parts, strict=False)
    columns = {name: _values(part, split) for name, part in named if part is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{split}: the lists must be of one length, these are of {lengths}.")
    return _table(split, columns, lengths["text"], columns.__getitem__)


def _of_table(source: Any, where: str) -> Table:
    if isinstance(source, list | tuple) and all(isinstance(row, Mapping) for row in source):
        keys = dict.fromkeys(key for row in source for key in row)
        return _table(where, keys, len(source), lambda key: [row.get(key) for row in source])
    # A frame has its columns as attributes, too: one may have a name that is asked for here.
    names = getattr(source, "column_names", None)
    names = names if isinstance(names, list) else getattr(source, "columns", None)
    if names is None or not hasattr(source, "__len__"):
        raise DataError(
            f"{where}: a {type(source).__name__} is no table: give a DataFrame, a Dataset or a "
            "list of dicts; for lists of texts and labels there is task_from_texts."
        )
    features = getattr(source, "features", None)
    return _table(where, names, len(source), source.__getitem__, features)


def _table(
    where: str,
    names: Iterable[Any],
    n_rows: int,
    column: Callable[[Any], Any],
    features: Any = None,
) -> Table:
    """A table of columns by name; a frame's names may be no texts."""
    known = list(names)
    by_name = {str(name): name for name in known}
    # What a ClassLabel of ``datasets`` says of a column of whole numbers.
    named = features.items() if isinstance(features, Mapping) else ()
    classes = {str(name): getattr(feature, "names", None) for name, feature in named}
    return Table(
        where,
        tuple(map(str, known)),
        n_rows,
        lambda name: _values(column(by_name[name]), where),
        lambda row: f"{where}[{row}]",
        {name: names for name, names in classes.items() if isinstance(names, list)},
    )


def _values(column: Any, where: str) -> list[Any]:
    """The values of a column; arrays and frames give Python's own by ``tolist``."""
    tolist = getattr(column, "tolist", None)
    values = tolist() if callable(tolist) else column
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{where}: a list is needed, got a {type(column).__name__}.")
    return list(values)
