"""Data sets of the hub, through the real library: of a server, and of folders in its layout."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import datasets
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import load_task
from tests.prompt_tuning.hub_server import hub_server


NAMES = ["World", "Sports", "Business"]
#: A card as the hub has it: two configs, and the names of a column's classes.
CARD = """---
configs:
- config_name: news
  data_files:
  - {split: train, path: news/train.csv}
  - {split: test, path: news/test.csv}
- config_name: tiny
  data_files:
  - {split: train, path: tiny.csv}
dataset_info:
- config_name: news
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label:
        names: {'0': World, '1': Sports, '2': Business}
---
"""


def csv_rows(n: int, what: str) -> bytes:
    return "\n".join(["text,label", *(f"{what} {i},{i % 3}" for i in range(n))]).encode()


REPOSITORIES = {
    "me/set": {
        "main": {
            "README.md": CARD.encode(),
            "news/train.csv": csv_rows(30, "new"),
            "news/test.csv": csv_rows(6, "test"),
            "tiny.csv": csv_rows(15, "tiny"),
        },
        "v1": {"train.csv": csv_rows(12, "old")},
    },
    "me/two": {
        "main": {
            "README.md": CARD.partition("dataset_info")[0].encode() + b"---\n",
            "news/train.csv": csv_rows(30, "new"),
            "news/test.csv": csv_rows(6, "test"),
            "tiny.csv": csv_rows(15, "tiny"),
        }
    },
    "me/script": {"main": {"script.py": b"open('ran', 'w')", "train.csv": csv_rows(30, "x")}},
    "me/broken": {"main": {"train.csv": b"\xff\xfe\x00", "README.md": b""}},
}
#: Loads what its arguments name, and prints tasks or errors as JSON.
PROGRAM = """
import dataclasses, json, sys
from optuna_llm_catalyst import DataError
from optuna_llm_catalyst.prompt_tuning import load_task
for source in sys.argv[1:]:
    try:
        print(json.dumps(dataclasses.asdict(load_task(source))))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], str]]:
    """What each source gave in one process that was pointed at our hub, and its stderr."""
    sources = [*FROM_THE_HUB, *REFUSED]
    home = tmp_path_factory.mktemp("home")
    with hub_server(REPOSITORIES) as url:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *sources],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    assert not (home / "ran").exists()
    yield dict(zip(sources, map(json.loads, done.stdout.splitlines()), strict=True)), done.stderr


#: Name, label names, texts' beginning, sizes of the splits, which were drawn.
FROM_THE_HUB = {
    "hf:me/set:news": ("set", NAMES, "new", [24, 6, 6], ["validation"]),
    "hf:me/set:news@main": ("set", NAMES, "new", [24, 6, 6], ["validation"]),
    "hf:me/set:tiny": ("set", ["0", "1", "2"], "tiny", [9, 3, 3], ["validation", "test"]),
    "hf:me/set@v1": ("set", ["0", "1", "2"], "old", [6, 3, 3], ["validation", "test"]),
}
REFUSED = {
    "hf:me/two": r"among the available configs: ['news', 'tiny']. The form is hf:NAME[:CONFIG]",
    "hf:me/none": "hf:me/none: cannot be loaded: Dataset 'me/none' doesn't exist on the Hub",
    "hf:me/set@v7": "cannot be loaded: Revision 'v7' doesn't exist",
    "hf:me/set:sports": "cannot be loaded: BuilderConfig 'sports' not found",
    "hf:me/script": "Dataset scripts are no longer supported, but found script.py",
    "hf:me/broken": "hf:me/broken: cannot be loaded: An error occurred while generating",
    "hf:": "hf:: the form is hf:NAME[:CONFIG][@REVISION]",
    "hf:a b/c": "hf:a b/c: cannot be loaded: ",
    "hf:me/set:@": "hf:me/set:@: the form is hf:NAME",
}


@pytest.mark.parametrize("source", FROM_THE_HUB)
def test_data_sets_of_a_hub(source: str, loaded: tuple[dict[str, Any], str]) -> None:
    name, labels, word, sizes, drawn = FROM_THE_HUB[source]
    task = loaded[0][source]
    splits = [task[split] for split in ("train", "validation", "test")]
    assert (task["name"], task["labels"], task["drawn"]) == (name, labels, drawn)
    assert [len(split) for split in splits] == sizes
    assert all(e["text"].startswith(word) for e in splits[0])
    assert all(int(e["text"].split()[1]) % 3 == e["label"] for split in splits for e in split)
    assert task["description"] == ""


@pytest.mark.parametrize("source", REFUSED)
def test_what_a_hub_refuses_is_one_line(source: str, loaded: tuple[dict[str, Any], str]) -> None:
    assert REFUSED[source] in loaded[0][source]
    assert "\n" not in loaded[0][source]


def test_loading_prints_no_progress(loaded: tuple[dict[str, Any], str]) -> None:
    assert "examples/s" not in loaded[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the library, whatever the machine has."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_in_the_layout_of_the_hub(end: str, tmp_path: Path) -> None:
    folder = tmp_path / "news"
    folder.mkdir()
    classes = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES)
    )
    for split, labels in {"train": [0, 1, 2] * 10, "test": [-1] * 3}.items():
        columns = {"sentence": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(columns, features=classes).to_parquet(
            folder / f"{split}.parquet"
        )
    task = load_task(f"hf:{folder}{end}")
    assert (task.name, task.labels) == ("news", tuple(NAMES))
    assert (len(task.train), len(task.validation), task.test) == (24, 6, ())
    assert task.notes == (
        "Columns were guessed: text = 'sentence'.",
        f"hf:{folder}{end} test has no labels: it is left out.",
    )


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_left_as_they_were(
    shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = datasets.is_progress_bar_enabled()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.csv").write_bytes(csv_rows(30, "a"))
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    load_task(f"hf:{tmp_path / 'a'}")
    assert datasets.is_progress_bar_enabled() == shown
    assert capfd.readouterr().err == ""
    (datasets.enable_progress_bars if before else datasets.disable_progress_bars)()


@pytest.mark.usefixtures("cache")
def test_a_folder_without_train_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test.csv").write_bytes(csv_rows(30, "a"))
    with pytest.raises(DataError, match=r"hf:.*a: there is no split train, there are: test\."):
        load_task(f"hf:{tmp_path / 'a'}")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:ag_news: .* pip install 'optuna-llm-catalyst\[data"):
        load_task("hf:ag_news")
