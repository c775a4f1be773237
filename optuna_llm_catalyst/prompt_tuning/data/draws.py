"""Seeded draws from the training examples, of as many or of the same share of each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning.data.task import Example
from optuna_llm_catalyst.prompt_tuning.data.task import listed
from optuna_llm_catalyst.prompt_tuning.data.task import Task


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """Draws a stratified few-shot task: ``shots`` a label to train on, as many to validate.

    Both come from the training split, as in BBT (arXiv 2201.03514), and share no text. A
    validation split that was itself drawn from the training split counts as a part of that. The
    test split is left as it is.

    Args:
        task: The task.
        shots: Examples a label, in each of the two splits.
        seed: Seed of the draw.

    Raises:
        DataError: If a label has too few examples.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, got {shots}.")
    pool = task.train + (task.validation if "validation" in task.drawn else ())
    distinct, rng = _distinct(pool), np.random.default_rng(seed)
    train: list[Example] = []
    validation: list[Example] = []
    for label, name in enumerate(task.labels):
        found = [example for example in distinct if example.label == label]
        if len(found) < 2 * shots:
            raise DataError(_too_few(name, label, pool, len(found), shots))
        drawn = [found[int(i)] for i in rng.permutation(len(found))[: 2 * shots]]
        train += drawn[:shots]
        validation += drawn[shots:]
    return _with_splits(task, train=train, validation=validation)


def draw_splits(task: Task, seed: int, *, validation: float = 0.2, test: float = 0.0) -> Task:
    """Draws the splits that a task lacks from its training split.

    The draw is stratified: each label gives the same share of its distinct texts, and at least
    one to train and one to validate. Of repeated texts the first is kept, so that what was drawn
    and what is left share no text.

    Args:
        task: The task. Splits that it has stay as they are.
        seed: Seed of the draw.
        validation: Share of the texts to validate, if the task has no validation split.
        test: Share of the texts to test, if the task has no test split.

    Raises:
        DataError: If a label has too few examples, or the shares leave none to train.
    """
    shares = {"validation": validation, "test": test}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise DataError(
            f"validation={validation} and test={test} must be shares that leave some to train."
        )
    # A draw of few texts may have left a split empty: another draw would take from the rest.
    done = {split for split in shares if getattr(task, split) or split in task.drawn}
    shares = {split: 0 if split in done else share for split, share in shares.items()}
    if not any(shares.values()):
        return task
    distinct, rng = _distinct(task.train), np.random.default_rng(seed)
    _check_each_label(task, distinct, 2 if shares["validation"] else 1)
    labels = np.array([example.label for example in distinct])
    split_of: dict[int, str] = {}
    for label in range(len(task.labels)):
        order = rng.permutation(np.flatnonzero(labels == label)).tolist()
        n = len(order)
        n_validation = min(_at_least_one(n * shares["validation"]), n - 1)
        n_test = min(round(n * shares["test"]), n - 1 - n_validation)
        split_of |= dict.fromkeys(order[:n_validation], "validation")
        split_of |= dict.fromkeys(order[n_validation : n_validation + n_test], "test")
    parts = {
        split: [e for i, e in enumerate(distinct) if split_of.get(i, "train") == split]
        for split in ("train", *(split for split, share in shares.items() if share))
    }
    return _with_splits(task, notes=_dropped(task.train, distinct), **parts)


def _with_splits(task: Task, notes: Sequence[str] = (), **splits: Sequence[Example]) -> Task:
    """The task with drawn splits, and with what there is to say of the draw."""
    drawn = dict.fromkeys([*task.drawn, *(split for split in splits if split != "train")])
    changes: dict[str, Any] = dict(splits)
    return replace(task, drawn=tuple(drawn), notes=(*task.notes, *notes), **changes)


def _at_least_one(share: float) -> int:
    return max(1, round(share)) if share else 0


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of each text: a text of two labels keeps its first."""
    distinct: dict[tuple[str, str | None], Example] = {}
    for example in examples:
        distinct.setdefault((example.text, example.text_pair), example)
    return list(distinct.values())


def _dropped(examples: Sequence[Example], distinct: Sequence[Example]) -> list[str]:
    n_repeated = len(examples) - len(distinct)
    n_contradicting = len(set(examples)) - len(distinct)
    if not n_repeated:
        return []
    other = f", {n_contradicting} of them under another label" if n_contradicting else ""
    return [f"Repeated texts were dropped before the draw: {n_repeated}{other}."]


def _check_each_label(task: Task, distinct: Sequence[Example], n_needed: int) -> None:
    counts = np.bincount([example.label for example in distinct], minlength=len(task.labels))
    short = [f"{task.labels[i]!r}" for i in np.flatnonzero(counts < n_needed)]
    if short:
        raise DataError(
            f"task {task.name!r}: {len(short)} of {len(task.labels)} labels have fewer than "
            f"{n_needed} distinct training examples, which the draw of splits needs: "
            f"{listed(short)}. Add examples of them, or take their rows out."
        )


def _too_few(name: str, label: int, pool: Sequence[Example], found: int, shots: int) -> str:
    texts = {(e.text, e.text_pair) for e in pool if e.label == label}
    shared = len(texts) - found
    return (
        f"label {name!r} has {found} distinct training examples"
        f"{f' ({shared} more stand under another label, too)' if shared else ''}, {shots} shots "
        f"need {2 * shots} (half of them to validate): "
        f"{f'use at most {found // 2} shots' if found > 1 else 'add examples of it'}."
    )
