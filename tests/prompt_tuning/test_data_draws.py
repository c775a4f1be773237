"""Draws of splits that a task lacks, and tasks that are built by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import assume
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import draw_splits
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import Task


SPLITS = ("train", "validation", "test")
LABELS = ("even", "odd")
FOUR = tuple(Example(str(i), i % 2) for i in range(4))


def make_task(texts: list[int]) -> Task:
    """A task with repeated texts, some of them under both labels."""
    return Task("numbers", LABELS, tuple(Example(str(i // 3), i % 2) for i in texts))


TASKS = st.lists(st.integers(0, 200), min_size=8, max_size=150).map(make_task)
SHARES = st.floats(0.01, 0.45)


def draw_or_give_up(task: Task, seed: int, **shares: float) -> Task:
    try:
        return draw_splits(task, seed, **shares)
    except DataError:
        assume(False)
        raise AssertionError from None


@given(TASKS, st.integers(0, 2**32), SHARES, SHARES)
def test_a_draw_parts_the_first_of_each_text(
    task: Task, seed: int, validation: float, test: float
) -> None:
    drawn = draw_or_give_up(task, seed, validation=validation, test=test)
    first = {e.text: e for e in reversed(task.train)}
    parts = [example for split in SPLITS for example in getattr(drawn, split)]
    assert sorted(parts, key=repr) == sorted(first.values(), key=repr)
    for split in SPLITS:
        places = [task.train.index(example) for example in getattr(drawn, split)]
        assert places == sorted(places)
    assert drawn.drawn == ("validation", "test")


@given(TASKS, st.integers(0, 2**32), SHARES, SHARES)
def test_each_label_gives_its_share(task: Task, seed: int, validation: float, test: float) -> None:
    drawn = draw_or_give_up(task, seed, validation=validation, test=test)
    counts = {
        split: Counter(example.label for example in getattr(drawn, split)) for split in SPLITS
    }
    for label in range(len(LABELS)):
        n = sum(count[label] for count in counts.values())
        assert counts["train"][label] >= 1 and counts["validation"][label] >= 1
        assert abs(counts["validation"][label] - validation * n) < 1
        # Where two or three texts are shared out, train and validation come first.
        assert -1 < test * n - counts["test"][label] < 1 or counts["train"][label] == 1


@example(make_task([0, 0, 0, 0, 0, 3, 6, 9]), 0)  # Too few of a label to test: none is drawn.
@given(TASKS, st.integers(0, 2**32))
def test_the_same_seed_draws_the_same_and_a_second_draw_nothing(task: Task, seed: int) -> None:
    drawn = draw_or_give_up(task, seed, test=0.2)
    assert drawn == draw_splits(task, seed, test=0.2)
    assert draw_splits(drawn, seed + 1, test=0.2) is drawn


def test_another_seed_draws_other_splits() -> None:
    task = make_task(list(range(100)))
    assert len({draw_splits(task, seed).validation for seed in range(10)}) == 10


def test_splits_that_are_there_stay() -> None:
    given_split = (Example("given", 0),)
    task = replace(make_task(list(range(60))), validation=given_split)
    drawn = draw_splits(task, 0, test=0.2)
    assert (drawn.validation, drawn.drawn) == (given_split, ("test",))
    assert len(drawn.test) == 4 and draw_splits(task, 0) is task


def test_repeated_texts_are_counted() -> None:
    repeated = (Example("0", 0), Example("0", 1), Example("1", 1))
    drawn = draw_splits(Task("numbers", LABELS, FOUR + repeated), 0)
    assert drawn.notes == (
        "Repeated texts were dropped before the draw: 3, 1 of them under another label.",
    )
    assert draw_splits(Task("numbers", LABELS, FOUR), 0).notes == ()


@given(st.integers(0, 2**32))
def test_shots_are_drawn_from_a_drawn_validation_split_too(seed: int) -> None:
    task = Task("numbers", LABELS, tuple(Example(str(i), i % 2) for i in range(20)))
    shots = few_shot(draw_splits(task, seed), 5, seed)
    assert set(shots.train) | set(shots.validation) == set(task.train)
    # A validation split that was given is no place to train from.
    kept = replace(task, validation=(Example("given", 0),))
    assert Example("given", 0) not in few_shot(kept, 5, seed).train


@pytest.mark.parametrize(
    "shares",
    [{"validation": -0.1}, {"validation": 0.5, "test": 0.5}, {"validation": 0.0, "test": 1.0}],
)
def test_shares_that_leave_none_to_train_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(DataError, match="shares that leave some to train"):
        draw_splits(Task("numbers", LABELS, FOUR), 0, **shares)


def test_labels_that_cannot_be_shared_out_are_named() -> None:
    task = Task("numbers", ("a", "b", "c"), (*FOUR[:3], Example("0", 2), Example("1", 2)))
    message = r"'numbers': 2 of 3 labels have fewer than 2 distinct .*: 'b', 'c'\. Add examples"
    with pytest.raises(DataError, match=message):
        draw_splits(task, 0)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_two_texts_of_a_label_are_one_to_train_and_one_to_validate(share: float) -> None:
    drawn = draw_splits(Task("numbers", LABELS, FOUR), 0, validation=share)
    assert Counter(e.label for e in drawn.train) == {0: 1, 1: 1}
    assert Counter(e.label for e in drawn.validation) == {0: 1, 1: 1}


# What is wrong, the fields that differ from a good task, and what the message must say.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no examples": ({"train": ()}, "`train` is empty"),
    "one label": ({"labels": ["even"]}, "two or more distinct labels, got even"),
    "a label twice": ({"labels": ["even", "even"]}, "two or more distinct labels"),
    "a label without a name": ({"labels": ["even", " "]}, "the label ' ' has 0 characters"),
    "a label that is no text": ({"labels": ["even", 1]}, "the label 1 must be a text"),
    "half an emoji in a label": ({"labels": ["even", "\ud83d"]}, "has half a character"),
    "a label index too large": (
        {"train": [Example("0", 0), Example("1", 2)]},
        r"train\[1\] has the label 2, 2 label names have 0 … 1",
    ),
    "a negative label": ({"test": [Example("0", -1)]}, r"test\[0\] has the label -1"),
    "a label's name": ({"validation": [Example("0", "odd")]}, r"has the label 'odd', it must be"),  # type: ignore[arg-type]
    "a label that is true": ({"train": [Example("0", True)]}, "has the label True, it must"),
    "a label of NumPy": ({"train": [Example("0", np.int64(1))]}, "a Python integer"),  # type: ignore[arg-type]
    "an empty text": ({"validation": [Example(" \n", 0)]}, r"validation\[0\] has an empty text"),
    "a text that is none": ({"train": [Example(None, 0)]}, "has None where a text must be"),  # type: ignore[arg-type]
    "half an emoji": ({"train": [Example("oh \ud83d", 0)]}, r"train\[0\] has half a character"),
    "a pair among single texts": (
        {"test": [Example("0", 0, "1")]},
        r'train\[0\]: there is no "text_pair", but .*test\[0\] has one',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_task_built_by_hand_is_checked(fault: str) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises(DataError, match="task 'numbers': .*" + message):
        replace(Task("numbers", LABELS, FOUR), **changes)


def test_lists_are_taken_for_tuples() -> None:
    task = Task("numbers", list(LABELS), list(FOUR), validation=list(FOUR))  # type: ignore[arg-type]
    assert task == Task("numbers", LABELS, FOUR, validation=FOUR)
