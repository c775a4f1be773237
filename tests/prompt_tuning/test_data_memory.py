"""Texts and labels in memory: lists, arrays, frames and data sets of libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import draw_splits
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning import task_from_table
from optuna_llm_catalyst.prompt_tuning import task_from_texts


TEXTS = [f"text {i}" for i in range(30)]
NAMES = ["bad", "good", "so-so"]
LABELS = [NAMES[i % 3] for i in range(30)]
INDICES = [i % 3 for i in range(30)]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
FRAME = pandas.DataFrame(ROWS, index=range(100, 130))
DATASET = datasets.Dataset.from_list(ROWS)
CLASSES = datasets.Features(
    text=datasets.Value("string"), label=datasets.ClassLabel(names=[*NAMES, "never"])
)
OTHER_CLASSES = datasets.Features(
    text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b", "c"])
)


def expected(seed: int = 0) -> Task:
    """The slow way: examples by hand, and the draw."""
    train = tuple(Example(text, i) for text, i in zip(TEXTS, INDICES, strict=True))
    return draw_splits(Task("task", tuple(NAMES), train), seed, test=0.2)


WAYS: dict[str, Callable[[], Task]] = {
    "lists": lambda: task_from_texts(TEXTS, LABELS),
    "tuples": lambda: task_from_texts(tuple(TEXTS), tuple(LABELS)),
    "generators": lambda: task_from_texts((text for text in TEXTS), iter(LABELS)),
    "arrays": lambda: task_from_texts(np.array(TEXTS), np.array(LABELS)),
    "lists of NumPy's texts": lambda: task_from_texts([*np.array(TEXTS)], [*np.array(LABELS)]),
    "columns of a frame": lambda: task_from_texts(FRAME["text"], FRAME["label"]),
    "categories": lambda: task_from_texts(FRAME["text"], FRAME["label"].astype("category")),
    "columns of a data set": lambda: task_from_texts(DATASET["text"], DATASET["label"]),
    "indices": lambda: task_from_texts(TEXTS, INDICES, label_names=NAMES),
    "an array of indices": lambda: task_from_texts(
        TEXTS, np.array(INDICES, dtype=np.uint8), label_names=NAMES
    ),
    "a list of NumPy's indices": lambda: task_from_texts(
        TEXTS, [*np.array(INDICES)], label_names=NAMES
    ),
    "a list of dicts": lambda: task_from_table(ROWS),
    "a frame": lambda: task_from_table(FRAME),
    "a frame with other columns": lambda: task_from_table(
        FRAME.rename(columns={"text": "columns", "label": "column_names"}).assign(features=1),
        text="columns",
        label="column_names",
    ),
    "a frame without names": lambda: task_from_table(
        pandas.DataFrame([[7, *row.values()] for row in ROWS]), text="1", label="2"
    ),
    "a frame with nullable columns": lambda: task_from_table(FRAME.convert_dtypes()),
    "a frame and the names of labels": lambda: task_from_table(
        FRAME.assign(label=INDICES), label_names=NAMES
    ),
    "a data set": lambda: task_from_table(DATASET),
    "a data set with classes": lambda: task_from_table(
        datasets.Dataset.from_dict({"text": TEXTS, "label": INDICES}, features=CLASSES)
    ),
    "a data set whose classes are named anew": lambda: task_from_table(
        datasets.Dataset.from_list(
            [{"text": text, "label": i} for text, i in zip(TEXTS, INDICES, strict=True)],
            features=OTHER_CLASSES,
        ).rename_column("label", "kind"),
        label="kind",
        label_names=NAMES,
    ),
    "a data set of one split": lambda: task_from_table(datasets.DatasetDict(train=DATASET)),
    "a mapping of one split": lambda: task_from_table({"train": ROWS}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_texts_in_any_form_are_the_same_task(way: str) -> None:
    assert WAYS[way]() == expected()


def test_the_seed_draws() -> None:
    assert task_from_texts(TEXTS, LABELS, seed=4) == expected(4)
    assert task_from_table(FRAME, seed=4) == expected(4) != expected(5)


def test_name_and_description_are_kept() -> None:
    told = {"name": "days", "description": "Is it fine?"}
    for task in (task_from_texts(TEXTS, LABELS, **told), task_from_table(FRAME, **told)):
        assert (task.name, task.description) == ("days", "Is it fine?")


def parts(n: int) -> tuple[list[str], list[str]]:
    return TEXTS[:n], LABELS[:n]


SPLITS: dict[str, Callable[[], Task]] = {
    "lists": lambda: task_from_texts(
        TEXTS[9:], LABELS[9:], validation=parts(6), test=(TEXTS[6:9], LABELS[6:9])
    ),
    "tables": lambda: task_from_table(ROWS[9:], validation=FRAME[:6], test=ROWS[6:9]),
    "a DatasetDict": lambda: task_from_table(
        datasets.DatasetDict(
            unsupervised=DATASET.select(range(2)),
            train=DATASET.select(range(9, 30)),
            validation=DATASET.select(range(6)),
            test=DATASET.select(range(6, 9)),
        )
    ),
    "a mapping with other names": lambda: task_from_table(
        {"train": ROWS[9:], "dev": ROWS[:6]}, test=FRAME[6:9]
    ),
}


@pytest.mark.parametrize("way", SPLITS)
def test_splits_that_are_given_are_kept(way: str) -> None:
    task = SPLITS[way]()
    assert [example.text for example in task.train] == TEXTS[9:]
    assert [example.text for example in task.validation] == TEXTS[:6]
    assert [example.text for example in task.test] == TEXTS[6:9]
    assert task.drawn == ()


def test_with_a_test_split_only_validation_is_drawn() -> None:
    task = task_from_texts(TEXTS[9:], LABELS[9:], test=parts(9))
    assert (task.drawn, len(task.validation), len(task.test)) == (("validation",), 3, 9)


def test_pairs() -> None:
    seconds = [f"second {i}" for i in range(30)]
    by_lists = task_from_texts(TEXTS, LABELS, seconds, test=(*parts(3), seconds[:3]))
    by_table = task_from_table(
        FRAME.assign(second=seconds),
        text_pair="second",
        test=[row | {"second": seconds[i]} for i, row in enumerate(ROWS[:3])],
    )
    assert by_lists == by_table
    assert by_lists.test[2] == Example("text 2", 2, "second 2")


#: Labels of four texts, and the label names that they give.
VALUES: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "texts": (["b", "a", "b", "a"], ("a", "b")),
    "whole numbers in their order": ([10, 9, 10, 9], ("9", "10")),
    "negative numbers": ([1, -1, 1, -1], ("-1", "1")),
    "booleans": ([True, False, True, False], ("False", "True")),
    "booleans of NumPy": ([*np.array([True, False, True, False])], ("False", "True")),
    "whole fractions": ([1.0, 2.0, 1, 2.0], ("1", "2")),
    "fractions": ([4.5, 5.0, 4.5, 5.0], ("4.5", "5")),
    "fractions of NumPy": ([*np.array([1, 0, 1, 0], dtype=np.float32)], ("0", "1")),
    "texts that are numbers": (["1", "01", "1", "01"], ("01", "1")),
    "texts and numbers": (["b", 1, "b", 1], ("1", "b")),
}


@pytest.mark.parametrize(("labels", "names"), VALUES.values(), ids=VALUES.keys())
def test_labels_of_any_type(labels: list[Any], names: tuple[str, ...]) -> None:
    task = task_from_texts(TEXTS[:4], labels)
    assert task.labels == names
    assert {type(e.label) for e in (*task.train, *task.validation)} == {int}


@pytest.mark.parametrize("blank", ["", " \n", None, np.nan, pandas.NA, pandas.NaT])
def test_texts_that_are_missing_are_dropped_and_said(blank: Any) -> None:
    task = task_from_texts([*TEXTS, blank], [*LABELS, "bad"])
    assert task == expected()
    assert task.notes == ("Rows without a text were dropped: 1, the first is train[30].",)


@pytest.mark.parametrize("missing", [None, np.nan, pandas.NA, pandas.NaT, "", " "])
def test_a_label_that_is_missing_is_an_error(missing: Any) -> None:
    with pytest.raises(DataError, match=r'train\[2\]: "label" is missing'):
        task_from_texts(TEXTS[:3], [*LABELS[:2], missing])


@pytest.mark.parametrize("unknown", [-1, None])
def test_a_test_split_without_labels_is_left_out_and_said(unknown: int | None) -> None:
    train = datasets.Dataset.from_dict({"text": TEXTS, "label": INDICES}, features=CLASSES)
    test = datasets.Dataset.from_dict({"text": ["a"], "label": [unknown]}, features=CLASSES)
    task = task_from_table(datasets.DatasetDict(train=train, test=test))
    assert (task.test, task.drawn) == ((), ("validation",))
    assert task.notes == ("test has no labels: it is left out.",)
    assert task.labels == tuple(NAMES)


CLASS_ROWS = datasets.Dataset.from_dict({"text": TEXTS, "label": INDICES}, features=CLASSES)
# What is wrong, what is called, and what the message must say.
FAULTS: dict[str, tuple[Callable[[], Task], str]] = {
    "other lengths": (
        lambda: task_from_texts(TEXTS, LABELS[1:]),
        r"train: the lists must be of one length, these are of \{'text': 30, 'label': 29\}",
    ),
    "one text": (lambda: task_from_texts("text", LABELS), "train: a list is needed, got a str"),
    "a number": (lambda: task_from_texts(TEXTS, 3), "train: a list is needed, got a int"),  # type: ignore[arg-type]
    "an array of nothing": (lambda: task_from_texts(TEXTS, np.array(3)), "a list is needed"),
    "nothing": (lambda: task_from_texts([], []), "train: there is no example in it"),
    "texts alone to test": (
        lambda: task_from_texts(TEXTS, LABELS, test=[TEXTS]),
        "`test` must be texts and labels",
    ),
    "no test examples": (
        lambda: task_from_texts(TEXTS, LABELS, test=([], [])),
        "test: there is no example in it",
    ),
    "a text that is a number": (
        lambda: task_from_texts([1, *TEXTS[1:]], LABELS),
        r'train\[0\]: "text" must be a text, got 1',
    ),
    "a text that is an array": (
        lambda: task_from_texts([*TEXTS[1:], np.arange(2)], LABELS),
        r'train\[29\]: "text" must be a text, got',
    ),
    "half an emoji": (
        lambda: task_from_texts([*TEXTS[1:], "oh \ud83d"], LABELS),
        r'train\[29\]: "text" has half a character',
    ),
    "a list as label": (
        lambda: task_from_texts(TEXTS, np.eye(3)[INDICES]),
        r'train\[0\]: "label" must be a text or a whole number, got \[1\.0, 0\.0, 0\.0\]',
    ),
    "a label that validation alone has": (
        lambda: task_from_texts(TEXTS, LABELS, validation=(["a"], ["awful"])),
        r"validation\[0\]: unknown label 'awful'; known are bad, good, so-so",
    ),
    "an index too large": (
        lambda: task_from_texts(TEXTS, INDICES, label_names=NAMES[:2]),
        r"train\[2\]: label 2 is none of 0 … 1",
    ),
    "a name without examples": (
        lambda: task_from_texts(TEXTS, INDICES, label_names=[*NAMES, "never"]),
        "train: no example of label never: add some, or take the label out of label_names",
    ),
    "a name twice": (
        lambda: task_from_texts(TEXTS, INDICES, label_names=["a", "a", "b"]),
        "label_names: a task needs two or more distinct labels",
    ),
    "labels that are all different": (
        lambda: task_from_texts(TEXTS, range(30)),
        r"'task': 30 of 30 labels have fewer than 2 distinct .*'19', …\. Add",
    ),
    "a mapping of columns": (
        lambda: task_from_table({"text": TEXTS, "label": LABELS}),
        "the table: there is no split train, there are: text, label",
    ),
    "two validation splits": (
        lambda: task_from_table({"train": ROWS, "dev": ROWS, "val": ROWS}),
        "the table: dev, val are all for validation; keep one of them",
    ),
    "no table": (
        lambda: task_from_table(TEXTS),
        "train: a list is no table: give a DataFrame, .* there is task_from_texts",
    ),
    "a column of a frame": (lambda: task_from_table(FRAME["text"]), "train: a Series is no table"),
    "a stream": (
        lambda: task_from_table(DATASET.to_iterable_dataset()),
        "train: a IterableDataset is no table",
    ),
    "a column that is not there": (
        lambda: task_from_table(FRAME, label="stars"),
        "train: there is no column 'stars'; there are 'text', 'label'",
    ),
    "a class that is not there": (
        lambda: task_from_table(CLASS_ROWS.map(lambda row: {"label": row["label"] - 1})),
        r'train\[0\]: "label" is -1, which is none of 0 … 3',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data_is_refused_by_row_and_fault(fault: str) -> None:
    call, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        call()
