"""Images through the commands: `tune`, `export` and `predict` of a tiny CLIP."""

from __future__ import annotations

import io
import json
from pathlib import Path
import shutil
import sys
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.cli.conftest import Result
from tests.prompt_tuning.tiny_clip import COLOUR_NAMES
from tests.prompt_tuning.tiny_clip import save_squares
from tests.prompt_tuning.tiny_clip import save_towers


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_squares(tmp_path_factory.mktemp("squares"), train=5, validation=3, test=3)


def tune(cli: Cli, data: Path, model: Path, *args: object) -> Result:
    short = ("--stages", 2, "--steps", 4, "--eval-every", 2, "--num-virtual-tokens", 3)
    return cli("tune", data, "--model", model, "--model-type", "clip", *short, *args)


def test_from_a_folder_of_images_to_predictions(
    cli: Cli, clip: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tune(cli, squares, clip, "--json")
    assert done.code == 0, done.err
    assert "15 images to train, 9 to validate, 9 to test" in done.err
    names = [row["name"] for row in done.json["comparison"]]
    assert names == [
        "class names alone",
        "linear probe",
        "probe pulled to class names",
        "first stage",
        "chosen stage",
        "ensemble",
        "fitted ensemble",
    ]
    # The study goes on from another folder with the same images, and the LLM hears of no path.
    moved = tmp_path / squares.name
    shutil.copytree(squares, moved)
    assert "Resuming" in tune(cli, moved, clip, "--stages", 1).err
    told = cli("meta-prompt")
    assert f"Classify images ({squares.name})." in told.out and "an image gets" in told.out
    assert ".png" not in told.out and str(squares) not in told.out

    assert cli("export", "colours").code == 0
    paths = [squares / "test" / name / "0.png" for name in COLOUR_NAMES]
    told = cli("predict", "colours", *(part for path in paths for part in ("--text", path)))
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert {row["label"] for row in rows} <= set(COLOUR_NAMES) and len(rows) == 3
    given = [{"id": i, "text": str(path)} for i, path in enumerate([*paths, "nowhere.png"])]
    lines = "\n".join(map(json.dumps, given)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    read = cli("predict", "colours")
    assert [json.loads(line) for line in read.out.splitlines()] == [
        {"id": i, **row} for i, row in enumerate(rows)
    ]
    assert read.code == 2
    assert "stdin:4: nowhere.png: no such file. The model reads images" in read.err


BAD: dict[str, tuple[Any, str]] = {
    "a text model": (
        lambda cli, clip, squares, model, data: cli("tune", squares, "--model", model),
        "of images: add --model-type clip and --model",
    ),
    "texts": (
        lambda cli, clip, squares, model, data: tune(cli, data, clip),
        "no such file. The model reads images",
    ),
    "another model": (
        lambda cli, clip, squares, model, data: tune(cli, squares, model),
        "it is a bert model: images are read by CLIP and SigLIP models",
    ),
    "examples for the LLM": (
        lambda cli, clip, squares, model, data: tune(cli, squares, clip, "--share-examples"),
        "(--share-examples) shows texts of the task to the LLM",
    ),
    "a text prompt": (
        lambda cli, clip, squares, model, data: tune(cli, squares, clip, "--text-prompts", 1),
        "CLIPClassifier takes prompts before its labels only",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(
    cli: Cli, clip: Path, squares: Path, tiny_model: Path, data: Path, case: str
) -> None:
    call, message = BAD[case]
    done = call(cli, clip, squares, tiny_model, data)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith("error: ")
