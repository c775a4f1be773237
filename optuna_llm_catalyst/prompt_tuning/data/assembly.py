"""Tables to a task: label names, checks across rows, and the draw of splits that are missing."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning.data.draws import draw_splits
from optuna_llm_catalyst.prompt_tuning.data.tables import choose_columns
from optuna_llm_catalyst.prompt_tuning.data.tables import Columns
from optuna_llm_catalyst.prompt_tuning.data.tables import is_labelled
from optuna_llm_catalyst.prompt_tuning.data.tables import NamedColumns
from optuna_llm_catalyst.prompt_tuning.data.tables import read_rows
from optuna_llm_catalyst.prompt_tuning.data.tables import Row
from optuna_llm_catalyst.prompt_tuning.data.tables import Table
from optuna_llm_catalyst.prompt_tuning.data.task import check_names
from optuna_llm_catalyst.prompt_tuning.data.task import check_pairs
from optuna_llm_catalyst.prompt_tuning.data.task import Example
from optuna_llm_catalyst.prompt_tuning.data.task import listed
from optuna_llm_catalyst.prompt_tuning.data.task import Task


#: What splits are called.
_CALLED = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Card:
    """What is known of a task beside its rows.

    Attributes:
        name: Its name.
        description: What it is, in a sentence.
        label_names: Label names, which whole numbers are indices into; None: from the rows.
        source: Where these names come from, for messages.
    """

    name: str
    description: str = ""
    label_names: Sequence[str] | None = None
    source: str = "label_names"


def pick_splits(names: Mapping[str, str], where: str) -> dict[str, str]:
    """Which thing is which split.

    Args:
        names: Things, each with the name that tells the split; others are left out.
        where: Where they are, for the message.

    Raises:
        DataError: If two things are one split.
    """
    picked: dict[str, str] = {}
    for split, called in _CALLED.items():
        things = [thing for thing, name in names.items() if name in called]
        if len(things) > 1:
            raise DataError(f"{where}: {listed(things)} are all for {split}; keep one of them.")
        picked |= dict.fromkeys([split] if things else [], *things)
    return picked


def make_task(
    tables: Mapping[str, Table], named: NamedColumns, card: Card, *, seed: int, strict: bool
) -> Task:
    """The task of tables by split; a validation split is drawn if there is none.

    Args:
        tables: The tables by split; ``train`` must be there.
        named: The columns that were named.
        card: What is known of the task.
        seed: Seed of the draw.
        strict: For splits that somebody prepared as such: what looks like a slip in them is an
            error (see :func:`read_rows`), and there is no test split but theirs. Otherwise one
            table alone is split in three.

    Raises:
        DataError: Names the row, what is wrong and what to do.
    """
    if card.label_names is not None:
        tables = {split: replace(table, class_names={}) for split, table in tables.items()}
    columns, notes = choose_columns(list(tables.values()), named)
    rows: dict[str, list[Row]] = {}
    for split, table in tables.items():
        if split == "train" or strict or is_labelled(table, columns):
            rows[split], dropped = read_rows(table, columns, strict=strict)
            notes += dropped
        else:
            notes.append(f"{table.name} has no labels: it is left out.")
    check_pairs({row.where: row.text_pair for found in rows.values() for row in found})
    names = _label_names(rows["train"], tables["train"], columns, card)
    examples = {split: tuple(_example(row, names) for row in rows[split]) for split in rows}
    _check_each_label(examples["train"], names, tables["train"].name, card)
    notes += _shared_texts(examples)
    task = Task(
        card.name,
        names,
        examples["train"],
        examples.get("validation", ()),
        examples.get("test", ()),
        description=card.description,
        notes=tuple(notes),
    )
    return draw_splits(task, seed, test=0.2 if len(tables) == 1 and not strict else 0)


def _label_names(
    rows: Sequence[Row], table: Table, columns: Columns, card: Card
) -> tuple[str, ...]:
    """Label names as they are known, or those of the training rows in their order."""
    used = {row.label for row in rows}
    if card.label_names is not None:
        names = card.label_names
    elif known := table.class_names.get(columns.label):
        names = [name for name in known if name in used]
    elif all(isinstance(label, int) for label in used):
        names = list(map(str, sorted(map(int, used))))
    else:
        names = sorted({str(label) for label in used})
    check_names(names, table.name if card.label_names is None else card.source)
    return tuple(names)


def _example(row: Row, names: Sequence[str]) -> Example:
    if str(row.label) in names:
        label = names.index(str(row.label))
    elif isinstance(row.label, str):
        raise DataError(
            f"{row.where}: unknown label {row.label[:80]!r}; known are {listed(names)}."
        )
    elif 0 <= row.label < len(names):
        label = row.label
    else:
        raise DataError(f"{row.where}: label {row.label} is none of 0 … {len(names) - 1}.")
    return Example(row.text, label, row.text_pair)


def _check_each_label(
    examples: Sequence[Example], names: Sequence[str], where: str, card: Card
) -> None:
    trained = {example.label for example in examples}
    missing = [name for label, name in enumerate(names) if label not in trained]
    if missing:
        raise DataError(
            f"{where}: no example of label {listed(missing)}: add some, or take the label out of "
            f"{card.source}."
        )


def _shared_texts(examples: Mapping[str, Collection[Example]]) -> list[str]:
    """What to say of texts that stand in the training split and in another one, too."""
    texts = {split: {(e.text, e.text_pair) for e in found} for split, found in examples.items()}
    counts = {split: len(texts[split] & texts["train"]) for split in texts if split != "train"}
    return [
        f"{count} texts of {split} are in train, too: its values look better than they are."
        for split, count in counts.items()
        if count
    ]
