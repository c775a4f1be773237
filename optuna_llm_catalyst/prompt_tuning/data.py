"""Labelled texts: a folder of JSONL files to splits, and few-shot draws from them.

A row is ``{"text": ..., "text_pair"?: ..., "label": ...}``; other keys are ignored. Label names
are in ``card.json`` under ``labels``; a row's label is a name or an index into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import json
import os
from pathlib import Path

import numpy as np

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError
from optuna_llm_catalyst.schema import T


_MAX_LABEL = 200
_MAX_LISTED = 20


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and the index of its label."""

    text: str
    label: int
    text_pair: str | None = None


@dataclass(frozen=True)
class Task:
    """Label names and splits.

    Attributes:
        name: Name of the task, for people.
        labels: Label names; an example's label is an index into them.
        train: What stages train on.
        validation: What prompts are selected by.
        test: What is reported; may be empty. Never used for selection.
        description: What the task is, in a sentence; may be empty.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class _Card:
    task: str | None = None
    description: str | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        for text in (self.task or "", self.description or "", *(self.labels or ())):
            _check_encodable("card", text)


@dataclass(frozen=True)
class _Row:
    text: str
    label: str | int
    text_pair: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError('"text" must not be empty')
        for name, value in vars(self).items():
            _check_encodable(name, str(value))


def load_task(folder: str | Path) -> Task:
    """Reads ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``card.json`` of a folder.

    Only ``train.jsonl`` must be there. Without ``card.json`` the labels are the training
    labels in alphabetical order. All files are checked whole.

    Args:
        folder: The folder. ``demo`` is the task that comes with the package, unless there is a
            folder of that name.

    Raises:
        DataError: Names the file, the line, what is wrong and what to do.
    """
    folder = _folder(folder)
    path = folder / "card.json"
    text = _read(path)
    card = _Card() if text is None else _parse(_Card, text, str(path), "cannot be read as JSON")
    splits = ("train", "validation", "test")
    rows = {split: _read_rows(folder / f"{split}.jsonl") for split in splits}
    if not rows["train"]:
        raise DataError(f"{folder / 'train.jsonl'}: missing; a task needs it.")
    _check_pairs({where: row for found in rows.values() for where, row in found.items()})
    labels = _labels(folder, card, rows["train"])
    examples = {
        split: tuple(_example(where, row, labels) for where, row in found.items())
        for split, found in rows.items()
    }
    trained = {example.label for example in examples["train"]}
    missing = [name for label, name in enumerate(labels) if label not in trained]
    if missing:
        raise DataError(
            f"{folder / 'train.jsonl'}: no example of label {_listed(missing)}: add some, or take "
            "the label out of card.json."
        )
    return Task(card.task or folder.name, labels, description=card.description or "", **examples)


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """Draws a stratified few-shot task: ``shots`` a label to train on, as many to validate.

    Both come from the training split, as in BBT (arXiv 2201.03514), and share no text; the test
    split is left as it is.

    Args:
        task: The task.
        shots: Examples a label, in each of the two splits.
        seed: Seed of the draw.

    Raises:
        DataError: If a label has too few examples.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, got {shots}.")
    distinct: dict[tuple[str, str | None], Example] = {}
    for example in task.train:  # A text of two labels keeps its first: splits share no text.
        distinct.setdefault((example.text, example.text_pair), example)
    rng = np.random.default_rng(seed)
    train: list[Example] = []
    validation: list[Example] = []
    for label in range(len(task.labels)):
        found = [example for example in distinct.values() if example.label == label]
        if len(found) < 2 * shots:
            raise DataError(_too_few(task, label, len(found), shots))
        drawn = [found[int(i)] for i in rng.permutation(len(found))[: 2 * shots]]
        train += drawn[:shots]
        validation += drawn[shots:]
    return replace(task, train=tuple(train), validation=tuple(validation))


def _too_few(task: Task, label: int, found: int, shots: int) -> str:
    texts = {(e.text, e.text_pair) for e in task.train if e.label == label}
    shared = len(texts) - found
    return (
        f"label {task.labels[label]!r} has {found} distinct training examples"
        f"{f' ({shared} more stand under another label, too)' if shared else ''}, {shots} shots "
        f"need {2 * shots} (half of them to validate): "
        f"{f'use at most {found // 2} shots' if found > 1 else 'add examples of it'}."
    )


def _folder(folder: str | Path) -> Path:
    if os.path.isdir(folder):
        return Path(folder)
    if str(folder) == "demo":
        return Path(__file__).parents[1] / "demo" / "customer_support"
    problem = "is a file" if os.path.isfile(folder) else "no such folder"
    raise DataError(
        f"{folder}: {problem}; give a folder that holds train.jsonl and, if you have them, "
        "validation.jsonl, test.jsonl and card.json."
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _read_rows(path: Path) -> dict[str, _Row]:
    """The rows of a JSONL file by their ``file:line``, none if there is no such file."""
    text = _read(path)
    if text is None:
        return {}
    lines = {f"{path}:{i}": line for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise DataError(f"{path}: there is no example in it: add some, or remove the file.")
    problem = "not a line of JSON"
    return {where: _parse(_Row, line, where, problem) for where, line in lines.items()}


def _parse(kind: type[T], text: str, where: str, problem: str) -> T:
    try:
        return decode(kind, json.loads(text))
    except SchemaError as error:
        raise DataError(f"{where}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {problem}: {first_line(error)}.") from error


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f'"{name}" has half a character, {half} at {error.start}, as a cut emoji leaves it: '
            "remove it"
        ) from error


def _check_pairs(rows: Mapping[str, _Row]) -> None:
    pairs = [where for where, row in rows.items() if row.text_pair]
    singles = [where for where, row in rows.items() if not row.text_pair]
    if pairs and singles:
        raise DataError(
            f'{singles[0]}: there is no "text_pair", but {pairs[0]} has one: all rows or none '
            "need it."
        )


def _labels(folder: Path, card: _Card, rows: Mapping[str, _Row]) -> tuple[str, ...]:
    path, names = folder / "card.json", card.labels
    if names is None:
        path, names = folder / "train.jsonl", sorted({str(row.label) for row in rows.values()})
    for name in names:
        if not 1 <= len(name.strip()) <= _MAX_LABEL:
            raise DataError(
                f"{path}: the label {name[:40]!r} has {len(name.strip())} characters: give it a "
                f"name of 1 to {_MAX_LABEL}."
            )
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{path}: a task needs two or more distinct labels, got {_listed(names)}.")
    return tuple(names)


def _example(where: str, row: _Row, labels: tuple[str, ...]) -> Example:
    if str(row.label) in labels:
        index = labels.index(str(row.label))
    elif isinstance(row.label, str):
        raise DataError(f"{where}: unknown label {row.label[:80]!r}; known are {_listed(labels)}.")
    elif 0 <= row.label < len(labels):
        index = row.label
    else:
        raise DataError(f"{where}: label {row.label} is none of 0 … {len(labels) - 1}.")
    return Example(row.text, index, row.text_pair or None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")
