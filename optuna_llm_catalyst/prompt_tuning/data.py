"""Labelled texts: a folder of JSONL files to splits, and few-shot draws from them.

A row is ``{"text": ..., "text_pair"?: ..., "label": ...}``; other keys are ignored. Label names
are in ``card.json`` under ``labels``; a row's label is a name or an index into them.
"""

from __future__ import annotations

from collections import Counter
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import numpy as np

from optuna_llm_catalyst.exceptions import DataError


SPLITS = ("train", "validation", "test")


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


def load_task(folder: str | Path) -> Task:
    """Reads ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``card.json`` of a folder.

    Only ``train.jsonl`` must be there. Without ``card.json`` the labels are the training
    labels in alphabetical order.

    Raises:
        DataError: Names the file, the line, what is wrong and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold train.jsonl and test.jsonl.")
    card = _read_card(folder / "card.json")
    rows = {split: _read_rows(folder / f"{split}.jsonl") for split in SPLITS}
    if not rows["train"]:
        raise DataError(f"{folder / 'train.jsonl'}: missing or empty; a task needs it.")
    labels = _labels(folder, card, rows["train"])
    splits = {
        split: tuple(_example(where, row, labels) for where, row in found)
        for split, found in rows.items()
    }
    task = Task(
        name=str(card.get("task", folder.name)),
        labels=labels,
        description=str(card.get("description", "")),
        **splits,
    )
    _check_train_labels(task, folder / "train.jsonl")
    return task


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
    by_label: dict[int, list[Example]] = defaultdict(list)
    for example in distinct.values():
        by_label[example.label].append(example)
    rng = np.random.default_rng(seed)
    train: list[Example] = []
    validation: list[Example] = []
    for label, name in enumerate(task.labels):
        found = by_label[label]
        if len(found) < 2 * shots:
            raise DataError(
                f"label {name!r} has {len(found)} distinct training examples, {shots} shots need "
                f"{2 * shots} (half of them to validate): use at most {len(found) // 2} shots."
            )
        drawn = [found[int(i)] for i in rng.permutation(len(found))[: 2 * shots]]
        train += drawn[:shots]
        validation += drawn[shots:]
    return replace(task, train=tuple(train), validation=tuple(validation))


def _read_card(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(card, dict):
        raise DataError(f"{path}: expected an object, got {type(card).__name__}.")
    return card


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file, each with ``file:line``; empty if there is no such file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append((f"{path}:{number}", _parse_row(f"{path}:{number}", line)))
    return rows


def _parse_row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {line[:60]}")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError(f'{where}: "text" must be a text that is not empty.')
    if not isinstance(row.get("text_pair"), str | None):
        raise DataError(f'{where}: "text_pair" must be a text.')
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f'{where}: "label" must be a name or an index, got {label!r}.')
    return row


def _labels(
    folder: Path, card: dict[str, Any], rows: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[str, ...]:
    names = card.get("labels")
    if names is None:
        names = sorted({str(row["label"]) for _, row in rows})
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise DataError(f'{folder / "card.json"}: "labels" must be a list of names.')
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{folder}: a task needs two or more distinct labels, got {names}.")
    return tuple(names)


def _example(where: str, row: dict[str, Any], labels: tuple[str, ...]) -> Example:
    label = row["label"]
    if isinstance(label, int) and str(label) not in labels:
        if not 0 <= label < len(labels):
            raise DataError(f"{where}: label {label} is none of 0 … {len(labels) - 1}.")
        return Example(row["text"], label, row.get("text_pair"))
    if str(label) not in labels:
        raise DataError(f"{where}: unknown label {label!r}; known are {', '.join(labels)}.")
    return Example(row["text"], labels.index(str(label)), row.get("text_pair"))


def _check_train_labels(task: Task, path: Path) -> None:
    counts = Counter(example.label for example in task.train)
    missing = [name for i, name in enumerate(task.labels) if not counts[i]]
    if missing:
        raise DataError(
            f"{path}: no example of label {', '.join(map(repr, missing))}: add some, or take the "
            "label out of card.json."
        )
