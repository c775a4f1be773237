"""Files of other kinds than JSON lines, single files, and folders of any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import csv
import json
from pathlib import Path
import re
import sys
from typing import Any

import datasets
from hypothesis import given
from hypothesis import strategies as st
import pandas
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import draw_splits
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Task


Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_separated(path: Path, rows: Rows, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)


#: Writers of other programs.
WRITERS: dict[str, tuple[str, Callable[[Path, Rows], Any]]] = {
    "JSON lines": (".jsonl", write_jsonl),
    "JSON lines in a .json": (".json", write_jsonl),
    "JSON lines of pandas": (
        ".jsonl",
        lambda path, rows: pandas.DataFrame(rows).to_json(path, orient="records", lines=True),
    ),
    "CSV": (".csv", lambda path, rows: write_separated(path, rows, ",")),
    "CSV with semicolons": (".csv", lambda path, rows: write_separated(path, rows, ";")),
    "CSV of pandas, with its index": (
        ".csv",
        lambda path, rows: pandas.DataFrame(rows).to_csv(path),
    ),
    "CSV of a spreadsheet": (
        ".CSV",
        lambda path, rows: pandas.DataFrame(rows).to_csv(
            path, index=False, encoding="utf-8-sig", lineterminator="\r\n", quoting=csv.QUOTE_ALL
        ),
    ),
    "TSV": (".tsv", lambda path, rows: write_separated(path, rows, "\t")),
    "Parquet of pandas": (".parquet", lambda path, rows: pandas.DataFrame(rows).to_parquet(path)),
    "Parquet of datasets": (
        ".parquet",
        lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    ),
}
TEXTS = (
    "plain",
    'a "quote" inside',
    '"quoted"',
    "a, b; c",
    "tab\there",
    "two\nlines",
    "ünï 🙂",
    " x ",
)
ROWS = [{"text": f"{TEXTS[i % 8]} {i}", "label": (i % 3) + 1, "id": i} for i in range(48)]


@pytest.fixture(autouse=True)
def _no_progress() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_rows_in_any_file_are_the_same_task(writer: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[writer]
    write(tmp_path / f"numbers{suffix}", ROWS)
    train = tuple(Example(row["text"], row["label"] - 1) for row in ROWS)
    expected = draw_splits(Task("numbers", ("1", "2", "3"), train), 5, test=0.2)
    task = load_task(tmp_path / f"numbers{suffix}", seed=5)
    assert task == expected
    assert (task.drawn, task.notes) == (("validation", "test"), ())
    assert [len(task.train), len(task.validation), len(task.test)] == [30, 9, 9]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_takes_any_file(writer: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[writer]
    (tmp_path / "card.json").write_text('{"task": "t", "labels": ["x", "bad", "so-so", "good"]}')
    zero = {"text": "zero", "label": 0, "id": 0}
    write(tmp_path / f"train{suffix}", [*ROWS[10:], zero])
    write(tmp_path / f"dev{suffix}", ROWS[:10])
    write_jsonl(tmp_path / "test.jsonl", ROWS[:5])
    task = load_task(tmp_path)
    assert (task.name, task.labels) == ("t", ("x", "bad", "so-so", "good"))
    assert [e.label for e in task.validation] == [row["label"] for row in ROWS[:10]]
    assert (len(task.train), len(task.test), task.drawn) == (39, 5, ())


#: Any text that a line of TSV without quoting can hold.
CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\n\r\ufeff"), min_size=1, max_size=5
).filter(lambda text: text.strip())


@given(st.lists(st.tuples(CELLS, st.sampled_from(["good", "bad"])), min_size=1, max_size=6))
def test_quotes_in_tsv_may_be_characters(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("raw") / "train.tsv"
    known = [('" open', "good"), ("plain", "bad"), ('open "', "good"), ("more", "bad")]
    lines = [("text", "label"), *known, *rows]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    (path.parent / "test.tsv").write_text("text\tlabel\nx\tgood\n")
    (path.parent / "validation.tsv").write_text("text\tlabel\nx\tgood\n")
    task = load_task(path.parent)
    assert [(e.text, task.labels[e.label]) for e in task.train] == [*known, *rows]


def test_the_names_of_classes_in_a_file_of_datasets_are_kept(tmp_path: Path) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "other", "yes"])
    )
    rows = [{"text": str(i), "label": 2 * (i % 2)} for i in range(10)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    task = load_task(tmp_path / "a.parquet")
    # No row has the class "other".
    assert task.labels == ("no", "yes")
    assert all(task.labels[e.label] == ("no", "yes")[int(e.text) % 2] for e in task.train)


#: Cells of labels in CSV, and the label names that they give.
LABEL_CELLS = {
    "names": (["good", " bad", "good ", "bad"], ("bad", "good")),
    "whole numbers in their order": (["10", "9", "10", "9"], ("9", "10")),
    "a column that pandas made floats": (["1.0", "2.0", "1", "2.00"], ("1", "2")),
    "fractions": (["4.5", "5", "4.5", "5"], ("4.5", "5")),
    "numbers with zeros in front": (["007", "7", "007", "7"], ("007", "7")),
    "booleans": (["True", "False", "True", "False"], ("False", "True")),
}


@pytest.mark.parametrize(("cells", "names"), LABEL_CELLS.values(), ids=LABEL_CELLS.keys())
def test_labels_in_csv(cells: list[str], names: tuple[str, ...], tmp_path: Path) -> None:
    lines = [f"text {i},{cell}" for i, cell in enumerate(cells)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    task = load_task(tmp_path / "a.csv")
    assert task.labels == names
    assert len(task.train) == len(task.validation) == 2


def test_rows_without_a_text_and_repeated_texts_are_dropped_and_said(tmp_path: Path) -> None:
    rows = [f"text {i},{i % 2}" for i in range(10)]
    lines = ["review,stars", *rows, "  ,1", ",0", "text 0,1", "text 1,1"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    task = load_task(tmp_path / "a.csv", text="review", label="stars")
    examples = task.train + task.validation + task.test
    assert Counter(e.text for e in examples) == Counter(f"text {i}" for i in range(10))
    assert task.notes == (
        f"Rows without a text were dropped: 2, the first is {tmp_path / 'a.csv'}:12.",
        "Repeated texts were dropped before the draw: 2, 1 of them under another label.",
    )


def test_texts_of_a_split_that_are_in_train_too_are_said(tmp_path: Path) -> None:
    for split, n in {"train": 10, "validation": 4, "test": 3}.items():
        rows = [{"text": f"{i if split != 'test' else i + 8}", "label": i % 2} for i in range(n)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    task = load_task(tmp_path)
    assert [note.partition(" texts")[0] for note in task.notes] == ["4", "2"]
    assert len(task.train) == 10


def test_a_folder_with_train_alone_gets_a_validation_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    task = load_task(tmp_path, seed=3)
    assert (len(task.train), len(task.validation), task.test) == (39, 9, ())
    assert task.drawn == ("validation",)
    assert load_task(tmp_path, seed=4).validation != task.validation


#: Columns, the options, and which columns are read.
COLUMNS: dict[str, tuple[list[str], dict[str, str], tuple[str | None, ...]]] = {
    "by default": (["id", "text", "label"], {}, ("text", "label", None)),
    "by default with pairs": (["text_pair", "text", "label"], {}, ("text", "label", "text_pair")),
    "in other letters": (["Text", "LABEL"], {}, ("Text", "LABEL", None)),
    "the exact name first": (["TEXT", "text", "label"], {}, ("text", "label", None)),
    "guessed": (["id", "content", "category"], {}, ("content", "category", None)),
    "the default before a guess": (["content", "text", "label"], {}, ("text", "label", None)),
    "guessed pairs": (["premise", "hypothesis", "label"], {}, ("premise", "label", "hypothesis")),
    "named": (
        ["text", "label", "a", "b", "c"],
        {"text": "a", "label": "b", "text_pair": "c"},
        ("a", "b", "c"),
    ),
}


@pytest.mark.parametrize(("names", "options", "read"), COLUMNS.values(), ids=COLUMNS.keys())
def test_columns(
    names: list[str], options: dict[str, str], read: tuple[str | None, ...], tmp_path: Path
) -> None:
    rows = [{name: f"{name} {i}" for name in names} for i in range(4)]
    label = str(read[1])
    rows = [row | {label: f"label {i % 2}"} for i, row in enumerate(rows)]
    write_separated(tmp_path / "a.csv", rows, ",")
    task = load_task(tmp_path / "a.csv", **options)
    example = min(task.train + task.validation, key=lambda e: e.text)
    assert (example.text, task.labels[example.label]) == (rows[0][str(read[0])], "label 0")
    assert example.text_pair == (rows[0][read[2]] if read[2] else None)
    guessed = [name for name in read if name not in ("text", "label", "text_pair", None)]
    guessed = [name for name in guessed if name not in options.values()]
    assert all(repr(name) in "".join(task.notes) for name in guessed)
    assert len(task.notes) == bool(guessed)


GOOD = "text,label\na,x\nb,y\nc,x\nd,y\n"

# What is wrong, a file and what is in it, options, and what the message must say.
FAULTS: dict[str, tuple[str, str | bytes, dict[str, str], str]] = {
    "an unknown kind": ("a.xlsx", GOOD, {}, r"a\.xlsx: its kind .*\.csv, \.tsv, \.jsonl"),
    "no kind": ("a", GOOD, {}, r"a: its kind is not known by its name"),
    "an empty file": ("a.csv", "", {}, r"a\.csv: there is no example in it: add"),
    "a header alone": ("a.csv", "text,label\n", {}, r"a\.csv: there is no example in it: add"),
    "blank lines": ("a.jsonl", "\n\n", {}, r"a\.jsonl: there is no example in it"),
    "no text at all": ("a.csv", "text,label\n,x\n ,y\n", {}, r"a\.csv: there is no example"),
    "UTF-16": ("a.csv", GOOD.encode("utf-16"), {}, r"a\.csv: cannot be read: .* as UTF-8"),
    "another code": ("a.csv", b"text,label\n\xe4,x\n", {}, r"a\.csv: cannot be read: .* as UTF-8"),
    "an unknown column": (
        "a.csv",
        GOOD,
        {"text": "review"},
        r"a\.csv: there is no column 'review'; there are 'text', 'label'",
    ),
    "an unknown column of second texts": (
        "a.csv",
        GOOD,
        {"text_pair": "b"},
        "there is no column 'b'",
    ),
    "no column that may hold texts": (
        "a.csv",
        "id,label\n1,x\n",
        {},
        r"a\.csv: which column holds the texts\? There are 'id', 'label'\. Name it: --text COLUMN",
    ),
    "two columns that may hold texts": (
        "a.csv",
        "content,review,label\na,b,x\n",
        {},
        r"which column holds the texts\? There are 'content', 'review', 'label'",
    ),
    "no column that may hold labels": (
        "a.csv",
        "text,coarse_label,fine_label\na,1,2\n",
        {},
        r"which column holds the labels\? .* Name it: --label COLUMN, or label=\.\.\. in Python",
    ),
    "no header": ("a.csv", "so good,1\nso bad,0\n", {}, r"There are 'so good', '1'"),
    "a column twice": (
        "a.csv",
        "text,text,label\na,b,x\n",
        {},
        "there is more than one column 'text'",
    ),
    "a comma without quotes": (
        "a.csv",
        GOOD + "so, so,x\n",
        {},
        r"a\.csv:6: 3 values for the 2 columns of the first line: put quotes around",
    ),
    "a value too few": ("a.csv", GOOD + "so\n", {}, r"a\.csv:6: 1 values for the 2 columns"),
    "the line of a value behind line breaks": (
        "a.csv",
        GOOD + '"1\n2\n3",x\n,y,z\n',
        {},
        r"a\.csv:9: 3 values",
    ),
    "a quote that is not closed": (
        "a.csv",
        GOOD + '"so,x\nmore,y\n',
        {},
        r"a\.csv:6: cannot be read: unexpected end of data\. A value that starts with a quote",
    ),
    "text behind a quote": ("a.csv", GOOD + '"so" so,x\n', {}, r"a\.csv:6: cannot be read: ','"),
    "no label": ("a.csv", GOOD + "e,\n", {}, r'a\.csv:6: "label" is missing'),
    "one label": ("a.csv", "text,label\na,x\nb,x\n", {}, "two or more distinct labels, got x"),
    "a label once": ("a.csv", GOOD + "e,z\n", {}, r"'a': 1 of 3 labels have fewer than 2 .*: 'z'"),
    "a pair among single texts": (
        "a.csv",
        "text,text_pair,label\na,,x\nb,c,y\n",
        {},
        r'a\.csv:2: there is no "text_pair", but .*a\.csv:3 has one',
    ),
    "no JSON": ("a.json", '[\n{"text": "a"}\n]', {}, r"a\.json:1: not a line of JSON"),
    "a list of JSON": ("a.json", '[{"text": "a"}]', {}, r"a\.json:1: must be an object"),
    "no label in JSON": ("a.jsonl", '{"text": "a", "label": null}', {}, r'a\.jsonl:1: "label" is'),
    "a list as label": (
        "a.jsonl",
        '{"text": "a", "label": [1]}',
        {},
        r'"label" must be a text or',
    ),
    "no Parquet": ("a.parquet", GOOD, {}, r"a\.parquet: cannot be read as Parquet: "),
    "an empty Parquet": ("a.parquet", b"", {}, r"a\.parquet: cannot be read as Parquet: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_by_line_and_fault(fault: str, tmp_path: Path) -> None:
    name, content, options, message = FAULTS[fault]
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="(?s)" + message) as raised:
        load_task(tmp_path / name, **options)
    assert "\n" not in str(raised.value)


def test_a_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": [1.0, None, 2.0]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a\.parquet\[1\]: "label" is missing'):
        load_task(tmp_path / "a.parquet")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.csv: no such file; give a folder .*hf:NAME"):
        load_task(tmp_path / "mine.csv")


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv", "validation.csv"):
        (tmp_path / name).write_text(GOOD)
    with pytest.raises(DataError, match=r"dev\.csv, validation\.csv are all for validation; keep"):
        load_task(tmp_path)


def test_in_a_folder_a_row_without_a_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text(GOOD + " ,x\n")
    with pytest.raises(DataError, match=r'test\.csv:6: "text" must not be empty'):
        load_task(tmp_path)


def test_a_split_without_the_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text("text\na\n")
    with pytest.raises(
        DataError, match=r"test\.csv: there is no column 'label'; there are 'text'"
    ):
        load_task(tmp_path)


def test_without_pyarrow_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    extra = re.escape("pip install 'optuna-llm-catalyst[datasets]'")
    with pytest.raises(DataError, match=rf"a\.parquet: pyarrow.*{extra}"):
        load_task(tmp_path / "a.parquet")
