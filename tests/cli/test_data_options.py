"""What `tune` takes as data, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optuna_llm_catalyst.cli.task import load_task
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from tests.cli.conftest import Cli
from tests.prompt_tuning.tiny import TOPICS


ROWS = [
    (f"the {word} {n}", topic, f"group {i}")
    for topic, words in TOPICS.items()
    for i, word in enumerate(words)
    for n in range(4)
]
LABELS = "3 labels: food, tool, wild_animal."
NAMED = {"text": "body", "label": "kind"}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows in files, in the folder where a command runs."""
    lines = [",".join(row) for row in [("body", "kind", "group"), *ROWS]]
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "all"):
        Path(folder).mkdir()
        Path(folder, "train.csv").write_text("\n".join(lines))
    Path("topics.csv").write_text("\n".join([*lines, ",tool,group 0", lines[1]]))
    Path("all/valid.tsv").write_text("body\tkind\nthe bear\tfood\n")
    Path("all/test.jsonl").write_text('{"body": "the saw 1", "kind": "tool"}\n')


def test_a_file_is_tuned_on_in_one_line(cli: Cli, tiny_model: Path) -> None:
    short = ("--model", tiny_model, "--stages", 1, "--steps", 2, "--num-virtual-tokens", 3)
    ask = ("tune", "topics.csv", "--text", "body", "--label", "kind", *short, "--json")
    result = cli(*ask)
    assert result.code == 0
    assert json.loads(result.out)["test"]["chosen"]["n_examples"] == 12
    assert f"Data topics: 36 texts to train, 12 to validate, 12 to test. {LABELS}" in result.err
    # The same seed draws the same splits, so that the study goes on; another does not.
    assert cli(*ask).code == 0
    refused = cli(*ask, "--seed", 1)
    assert refused.code == 2 and "data with checksum" in refused.err


#: The options, and what the screen says.
SAID: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a file": (
        {"data": "topics.csv"},
        [
            f"Data topics: 36 texts to train, 12 to validate, 12 to test. {LABELS}",
            "Drawn label by label from the training texts (seed 0): validation, test.",
            "Rows without a text were dropped: 1, the first is topics.csv:62.",
            "Repeated texts were dropped before the draw: 1.",
        ],
    ),
    "shots of a file": (
        {"data": "topics.csv", "shots": 8, "seed": 3},
        [
            f"Data topics: 24 texts to train, 24 to validate, 12 to test. {LABELS}",
            "Drawn label by label from the training texts (seed 3): 8 texts of each label to "
            "train, as many to validate, the test split.",
            "Rows without a text were dropped: 1, the first is topics.csv:62.",
            "Repeated texts were dropped before the draw: 1.",
        ],
    ),
    "a folder with train alone": (
        {"data": "train"},
        [
            f"Data train: 48 texts to train, 12 to validate, none to test. {LABELS}",
            "Drawn label by label from the training texts (seed 0): validation.",
        ],
    ),
    "shots of a folder": (
        {"data": "all", "shots": 2},
        [
            f"Data all: 6 texts to train, 6 to validate, 1 to test. {LABELS}",
            "Drawn label by label from the training texts (seed 0): 2 texts of each label to "
            "train, as many to validate.",
            "1 texts of test are in train, too: its values look better than they are.",
        ],
    ),
    "the demo": (
        {"data": "demo", "text": "", "label": ""},
        [
            "Data customer_support: 192 texts to train, 132 to validate, 216 to test. 6 labels: "
            "billing, cancellation, delivery, login, product question, return.",
        ],
    ),
}


@pytest.mark.parametrize(("options", "said"), SAID.values(), ids=SAID.keys())
def test_what_is_said_of_a_task(options: dict[str, Any], said: list[str]) -> None:
    assert load_task(TuneOptions(**(NAMED | options)))[1] == said


def test_many_labels_are_said_in_part() -> None:
    rows = [f"text {i},label {i % 20:02}" for i in range(40)]
    Path("many.csv").write_text("\n".join(["text,label", *rows]))
    first = load_task(TuneOptions(data="many.csv"))[1][0]
    assert first.endswith(
        "20 labels: " + ", ".join(f"label {i:02}" for i in range(12)) + " and 8 more."
    )


#: Arguments, and what the one line says.
FAULTS = {
    "columns that are not clear": (
        ["topics.csv", "--text", "body"],
        "topics.csv: which column holds the labels? There are 'body', 'kind', 'group'. Name it: "
        "--label COLUMN",
    ),
    "a column that is not there": (
        ["topics.csv", "--text", "text"],
        "topics.csv: there is no column 'text'; there are 'body', 'kind', 'group'.",
    ),
    "a label for each text": (
        ["train/train.csv", "--text", "kind", "--label", "body"],
        "task 'train': 60 of 60 labels have fewer than 2 distinct training examples",
    ),
    "too many shots": (["topics.csv", *"--text body --label kind --shots 9".split()], "8 shots"),
    "no such file": (["none.csv"], "none.csv: no such file; give a folder"),
    "no name": (["hf:"], "hf:: the form is hf:NAME[:CONFIG][@REVISION]"),
    "bytes": (["topics.csv", "--text", "\udcff"], "--text must be UTF-8"),
}


@pytest.mark.parametrize(("args", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_mistake_is_one_line(cli: Cli, args: list[str], message: str) -> None:
    result = cli("tune", *args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert message in result.err
