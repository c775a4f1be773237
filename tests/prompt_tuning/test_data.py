from __future__ import annotations

from collections import Counter
import json
from pathlib import Path
import re
from typing import Any

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Task


ROOT = Path(__file__).parents[2]
TREC = ROOT.parent / "shared" / "data" / "trec"


def write_task(folder: Path, files: dict[str, Any]) -> Path:
    """Writes files: bytes and texts as they are, a list as JSON lines, a dict as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


GOOD = [{"text": "a fine day", "label": "good"}, {"text": "rain again", "label": "bad"}]
GOOD_LINES = "".join(json.dumps(row) + "\n" for row in GOOD)
CARD = {"labels": ["bad", "good"]}


def load_both(folder: Path, files: dict[str, Any]) -> Task:
    """Loads a task whose training rows validate, too, so that none are drawn."""
    return load_task(write_task(folder, files | {"validation.jsonl": files["train.jsonl"]}))


def with_row(row: Any) -> dict[str, Any]:
    return {"card.json": CARD, "train.jsonl": [*GOOD, row]}


# What is wrong, the folder's files, and what the message must say.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no training file": ({"card.json": CARD}, r"train\.jsonl: missing; a task"),
    "an empty training file": (
        {"train.jsonl": "\n\n"},
        r"train\.jsonl: there is no example in it: add",
    ),
    "a line that is no JSON": (
        {"train.jsonl": GOOD_LINES + "{oops\n"},
        r"train\.jsonl:3: not a line of JSON",
    ),
    "no JSON behind blank lines": (
        {"train.jsonl": "\n\n" + GOOD_LINES + "\n{oops\n"},
        r"train\.jsonl:6: not a line of JSON",
    ),
    "no JSON in another split": (
        {"train.jsonl": GOOD, "test.jsonl": "{oops"},
        r"test\.jsonl:1: not a line of JSON",
    ),
    "nesting beyond all measure": (
        {"train.jsonl": GOOD_LINES + "[" * 100_000},
        r"train\.jsonl:3: not a line of JSON",
    ),
    "bytes that are no UTF-8": ({"train.jsonl": b'{"text": "\xff"}'}, r"train\.jsonl: cannot"),
    "a row that is no object": (with_row(["text", "good"]), r"train\.jsonl:3: must be an object"),
    "no text": (with_row({"label": "good"}), r'train\.jsonl:3: "text" is missing'),
    "an empty text": (with_row({"text": " \t", "label": "good"}), r'train\.jsonl:3: "text" must'),
    "a text that is a number": (with_row({"text": 3, "label": 0}), r'train\.jsonl:3: "text" must'),
    "a text_pair that is a list": (
        with_row({"text": "x", "text_pair": ["y"], "label": 0}),
        r'train\.jsonl:3: "text_pair" must be a text',
    ),
    "no label": (with_row({"text": "x"}), r'train\.jsonl:3: "label" is missing'),
    "a label that is a bool": (
        with_row({"text": "x", "label": True}),
        r'train\.jsonl:3: "label" must be .* got True',
    ),
    "a label that is a float": (with_row({"text": "x", "label": 1.0}), r'3: "label" must be'),
    "an unknown label name": (
        with_row({"text": "x", "label": "ugly"}),
        r"train\.jsonl:3: unknown label 'ugly'; known are bad, good",
    ),
    "a label index too large": (with_row({"text": "x", "label": 2}), r"3: label 2 is none of 0 …"),
    "a negative label index": (with_row({"text": "x", "label": -1}), r"3: label -1 is none of 0"),
    "an unknown label in another split": (
        {"train.jsonl": GOOD, "validation.jsonl": [{"text": "x", "label": "ugly"}]},
        r"validation\.jsonl:1: unknown label 'ugly'",
    ),
    "a label that train lacks": (
        {"card.json": {"labels": ["bad", "good", "ugly"]}, "train.jsonl": GOOD},
        r"train\.jsonl: no example of label ugly:",
    ),
    "one label only": ({"train.jsonl": GOOD[:1]}, r"two or more distinct labels, got good"),
    "a card that is no JSON": (
        {"card.json": "{", "train.jsonl": GOOD},
        r"card\.json: cannot be read as JSON",
    ),
    "a card that is a list": (
        {"card.json": "[]", "train.jsonl": GOOD},
        r"card\.json: must be an object, got",
    ),
    "labels that are a text": (
        {"card.json": {"labels": "bad"}, "train.jsonl": GOOD},
        r'card\.json: "labels" must be a list',
    ),
    "a label without a name": (
        {"card.json": {"labels": ["bad", " "]}, "train.jsonl": GOOD},
        r"card\.json: the label ' ' has 0 characters: give it a name",
    ),
    "no labels": (
        {"card.json": {"labels": []}, "train.jsonl": GOOD},
        r"card\.json: .* two or more",
    ),
    "a label of 10 kB": (
        {"card.json": {"labels": ["bad", "x" * 10_000]}, "train.jsonl": GOOD},
        r"card\.json: the label 'x{40}' has 10000 characters: give it a name of 1 to 200",
    ),
    "a label of 10 kB without a card": (
        {"train.jsonl": [*GOOD, {"text": "x", "label": "x" * 10_000}]},
        r"train\.jsonl: the label 'x{40}' has 10000 characters",
    ),
    "a card nested beyond all measure": (
        {"card.json": "[" * 200_000, "train.jsonl": GOOD},
        r"card\.json: cannot be read as JSON",
    ),
    "a description that is a list": (
        {"card.json": CARD | {"description": ["x"]}, "train.jsonl": GOOD},
        r'card\.json: "description" must be a text or null',
    ),
    "half an emoji": (
        {"train.jsonl": GOOD_LINES + r'{"text": "oh \ud83d", "label": "bad"}'},
        r'train\.jsonl:3: "text" has half a character, .\\ud83d. at 3',
    ),
    "half an emoji in the test split": (
        {"train.jsonl": GOOD, "test.jsonl": GOOD_LINES + r'{"text": "\udca9", "label": "bad"}'},
        r'test\.jsonl:3: "text" has half a character',
    ),
    "half an emoji in the second text": (
        {"train.jsonl": r'{"text": "x", "text_pair": "\udca9", "label": "bad"}'},
        r'train\.jsonl:1: "text_pair" has half a character',
    ),
    "half an emoji in a label": (
        {"card.json": r'{"labels": ["bad", "\ud83d"]}', "train.jsonl": GOOD},
        r'card\.json: "card" has half a character',
    ),
    "an empty validation file": (
        {"train.jsonl": GOOD, "validation.jsonl": ""},
        r"validation\.jsonl: there is no example in it: add some, or remove the file",
    ),
    "a pair among single texts": (
        with_row({"text": "x", "text_pair": "y", "label": "bad"}),
        r'train\.jsonl:1: there is no "text_pair", but .*train\.jsonl:3 has one',
    ),
    "pairs to train on and single texts to test": (
        {"train.jsonl": [row | {"text_pair": "y"} for row in GOOD], "test.jsonl": GOOD},
        r'test\.jsonl:1: there is no "text_pair", but .*train\.jsonl:1 has one',
    ),
    "UTF-16": ({"train.jsonl": GOOD_LINES.encode("utf-16")}, r"train\.jsonl: cannot .* as UTF-8"),
    "a label given twice": (
        {"card.json": {"labels": ["bad", "good", "bad"]}, "train.jsonl": GOOD},
        r"distinct labels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_by_file_line_and_fault(fault: str, tmp_path: Path) -> None:
    files, message = FAULTS[fault]
    folder = write_task(tmp_path / "task", files)
    with pytest.raises(DataError, match=re.escape(str(folder)) + ".*" + message):
        load_task(folder)


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "x/" * 3000, "a\0b", "\udcff"])
def test_a_folder_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; give a folder .*train\.jsonl"):
        load_task(tmp_path / name)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path, {"train.jsonl": GOOD})
    (folder / "validation.jsonl").mkdir()
    with pytest.raises(DataError, match=r"validation\.jsonl: cannot be read: Is a directory"):
        load_task(folder)


def test_label_names_and_label_indices_say_the_same(tmp_path: Path) -> None:
    by_name = load_both(tmp_path / "task", {"card.json": CARD, "train.jsonl": GOOD})
    indices = [row | {"label": CARD["labels"].index(row["label"])} for row in GOOD]
    by_index = load_both(tmp_path / "task", {"train.jsonl": indices})
    assert by_name == by_index
    assert by_name.train == (Example("a fine day", 1), Example("rain again", 0))


def test_without_a_card_the_labels_are_those_of_train(
    tmp_path: Path,
) -> None:
    rows = [{"text": "x", "label": label} for label in ("wet", "dry", "cold", "dry")]
    task = load_both(tmp_path / "weather", {"train.jsonl": rows})
    assert task.labels == ("cold", "dry", "wet")
    assert [task.labels[example.label] for example in task.train] == ["wet", "dry", "cold", "dry"]
    assert (task.name, task.description) == ("weather", "")


def test_label_names_that_are_digits_are_names_and_not_indices(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": 1}, {"text": "two", "label": "2"}]
    files = {"card.json": {"labels": ["2", "1"]}, "train.jsonl": rows}
    task = load_both(tmp_path / "task", files)
    assert [task.labels[example.label] for example in task.train] == ["1", "2"]


def test_the_card_names_and_describes_the_task(tmp_path: Path) -> None:
    card = CARD | {"task": "weather", "description": "Is it fine?", "rows": {"train": 2}}
    task = load_both(tmp_path / "task", {"card.json": card, "train.jsonl": GOOD})
    assert (task.name, task.description, task.labels) == (
        "weather",
        "Is it fine?",
        ("bad", "good"),
    )


@pytest.mark.parametrize("separator", ["\n", "\n\n  \n", "\r\n"])
def test_blank_lines_and_line_ends_do_not_matter(separator: str, tmp_path: Path) -> None:
    lines = separator.join(["", *GOOD_LINES.split("\n")])
    task = load_both(tmp_path / "task", {"train.jsonl": lines})
    assert [example.text for example in task.train] == ["a fine day", "rain again"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\u00a0"])
def test_line_separators_of_unicode_stay_inside_their_text(character: str, tmp_path: Path) -> None:
    rows = [{"text": f"one{character}two", "label": "good"}, GOOD[1]]
    task = load_both(tmp_path / "task", {"train.jsonl": rows})
    assert task.train[0].text == f"one{character}two"


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    files = {"train.jsonl": mark + GOOD_LINES.encode(), "card.json": mark + b'{"task": "t"}'}
    task = load_both(tmp_path / "task", files)
    assert (task.train[0].text, task.name) == ("a fine day", "t")


@pytest.mark.parametrize("pair", ["or is it", None, ""])
def test_text_pairs_are_read_and_foreign_keys_are_not(pair: str | None, tmp_path: Path) -> None:
    rows = [row | {"text_pair": pair, "source": 7} for row in GOOD]
    task = load_both(tmp_path / "task", {"train.jsonl": rows})
    pair = pair or None
    assert task.train == (Example("a fine day", 1, pair), Example("rain again", 0, pair))


LABELS = ("even", "odd", "rest")


def numbered_example(number: int) -> Example:
    text, rest = divmod(number, 2 * len(LABELS))
    label, pair = divmod(rest, 2)
    return Example(str(text), label, f"pair {pair}")


#: Tasks full of duplicates, some with contradicting labels.
TASKS = st.lists(st.integers(0, 99).map(numbered_example), min_size=12, max_size=60).map(
    lambda examples: Task("numbers", LABELS, tuple(examples))
)


def draw_or_give_up(task: Task, shots: int, seed: int) -> Task:
    try:
        return few_shot(task, shots, seed)
    except DataError:
        assume(False)
        raise AssertionError from None


@settings(max_examples=50)
@given(TASKS, st.integers(1, 3), st.integers(0, 2**32))
def test_a_draw_has_as_many_of_each_label_as_shots(task: Task, shots: int, seed: int) -> None:
    drawn = draw_or_give_up(task, shots, seed)
    for split in (drawn.train, drawn.validation):
        assert Counter(example.label for example in split) == dict.fromkeys(range(3), shots)
        assert set(split) <= set(task.train)
    assert (drawn.labels, drawn.test) == (task.labels, task.test)


@settings(max_examples=50)
@given(TASKS, st.integers(1, 3), st.integers(0, 2**32))
def test_no_text_is_in_both_splits_of_a_draw(task: Task, shots: int, seed: int) -> None:
    drawn = draw_or_give_up(task, shots, seed)
    texts = [(example.text, example.text_pair) for example in drawn.train + drawn.validation]
    assert len(set(texts)) == len(texts)


@settings(max_examples=50)
@given(TASKS, st.integers(1, 3), st.integers(0, 2**32))
def test_the_same_seed_draws_the_same(task: Task, shots: int, seed: int) -> None:
    assert draw_or_give_up(task, shots, seed) == few_shot(task, shots, seed)


def test_another_seed_draws_another_task() -> None:
    examples = tuple(Example(str(i), i % 2) for i in range(40))
    task = Task("numbers", ("even", "odd"), examples)
    assert len({few_shot(task, 4, seed) for seed in range(10)}) == 10


def test_too_few_examples_are_refused_by_label_count_and_fix() -> None:
    # Ten examples of "odd", of which only five are distinct.
    examples = tuple(Example(str(2 * i), 0) for i in range(20)) + 2 * tuple(
        Example(str(2 * i + 1), 1) for i in range(5)
    )
    task = Task("numbers", ("even", "odd"), examples)
    with pytest.raises(DataError, match=r"'odd' has 5 distinct .* at most 2 shots"):
        few_shot(task, 3, seed=0)
    assert len(few_shot(task, 2, seed=0).train) == 4


def test_texts_of_two_labels_are_told_where_they_are_missed() -> None:
    examples = [Example(str(i), 0) for i in range(6)] + [Example(str(i), 1) for i in range(6)]
    task = Task("numbers", ("even", "odd"), (*examples, Example("7", 1)))
    message = r"'odd' has 1 distinct .*\(6 more stand under another label, too\).*: add examples"
    with pytest.raises(DataError, match=message):
        few_shot(task, 1, seed=0)


@pytest.mark.parametrize("shots", [0, -1])
def test_a_draw_needs_a_shot(shots: int) -> None:
    task = Task("numbers", ("even", "odd"), (Example("0", 0), Example("1", 1)))
    with pytest.raises(DataError, match="at least 1"):
        few_shot(task, shots, seed=0)


@pytest.mark.skipif(not TREC.is_dir(), reason="The data sets are not on this machine.")
def test_a_draw_of_trec_keeps_the_test_split() -> None:
    task = load_task(TREC)
    assert (len(task.labels), len(task.train), len(task.test)) == (6, 3000, 500)
    drawn = few_shot(task, 16, seed=0)
    assert Counter(e.label for e in drawn.train) == dict.fromkeys(range(6), 16)
    assert Counter(e.label for e in drawn.validation) == dict.fromkeys(range(6), 16)
    assert not {e.text for e in drawn.train} & {e.text for e in drawn.validation}
    assert drawn.test == task.test
    with pytest.raises(DataError, match="'abbreviation'"):
        few_shot(task, 30, seed=0)


def test_the_demo_has_distinct_messages_in_disjoint_splits() -> None:
    task = load_task("demo")
    assert len(task.labels) == 6
    assert task.description
    splits = (task.train, task.validation, task.test)
    messages = [example for split in splits for example in split]
    assert len({example.text for example in messages}) == len(messages)
    for split in splits:
        assert len(set(Counter(example.label for example in split).values())) == 1
    assert min(Counter(example.label for example in messages).values()) >= 60


def test_a_folder_named_demo_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_both(tmp_path / "demo", {"train.jsonl": GOOD})
    monkeypatch.chdir(tmp_path)
    assert load_task("demo").labels == ("bad", "good")
