"""Folders of images to tasks, and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.data.images import read_image

from .tiny_clip import COLOUR_NAMES
from .tiny_clip import save_squares


def sizes(task: Task) -> list[int]:
    return [len(split) for split in (task.train, task.validation, task.test)]


def labels_of(task: Task) -> set[tuple[str, str]]:
    """The label of each example, beside the name of the folder it came from."""
    examples = (*task.train, *task.validation, *task.test)
    return {(task.labels[e.label], Path(e.text).parent.name) for e in examples}


@pytest.mark.parametrize(
    ("splits", "expected", "drawn"),
    [
        ({"train": 5, "validation": 2, "test": 3}, [15, 6, 9], ()),
        ({"train": 5, "val": 2}, [15, 6, 0], ()),
        ({"train": 5, "test": 3}, [12, 3, 9], ("validation",)),
        # Folders of labels alone are one table, which is split in three.
        ({".": 5}, [9, 3, 3], ("validation", "test")),
    ],
)
def test_a_folder_of_images_is_a_task(
    tmp_path: Path, splits: dict[str, int], expected: list[int], drawn: tuple[str, ...]
) -> None:
    task = load_task(save_squares(tmp_path / "squares", **splits))
    assert (task.name, task.labels, task.of_images) == ("squares", COLOUR_NAMES, True)
    assert (sizes(task), task.drawn, task.notes) == (expected, drawn, ())
    assert labels_of(task) == {(name, name) for name in COLOUR_NAMES}
    assert few_shot(task, shots=1, seed=0).of_images


def test_card_json_names_and_orders_the_labels(tmp_path: Path) -> None:
    labels = ["red", "deep_blue", "green"]
    card = {"task": "colours", "labels": labels, "description": "Which colour?"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    task = load_task(save_squares(tmp_path, train=2))
    assert (task.name, task.labels, task.description) == (
        "colours",
        tuple(labels),
        card["description"],
    )
    assert labels_of(task) == {(name, name) for name in labels}


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    save_squares(tmp_path, train=3)
    red = tmp_path / "train" / "red"
    for name in ("notes.txt", ".hidden.png"):
        (red / name).write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    (red / "more").mkdir()
    (red / ".ipynb_checkpoints").mkdir()
    shutil.copy(red / "1.png", red / ".ipynb_checkpoints" / "1-checkpoint.png")
    shutil.move(red / "0.png", red / "more" / "0.PNG")  # A folder in a label's belongs to it.
    task = load_task(tmp_path)
    assert sum(sizes(task)) == 9
    assert task.labels == COLOUR_NAMES


def test_images_with_the_same_bytes_are_one(tmp_path: Path) -> None:
    train = save_squares(tmp_path, train=3, test=2) / "train"
    shutil.copy(train / "red" / "0.png", train / "red" / "again.png")
    shutil.copy(train / "red" / "0.png", tmp_path / "train" / "red" / "once_more.png")
    shutil.copy(train / "green" / "0.png", train / "red" / "green.png")
    shutil.copy(train / "red" / "1.png", tmp_path / "test" / "red" / "known.png")
    task = load_task(tmp_path)
    assert sum(sizes(task)) == 9 + 7
    assert task.notes[:2] == (
        "Repeated images were dropped from train: 3, 1 of them under another label.",
        "1 images of test are in train, too: its values look better than they are.",
    )


def test_an_image_is_read_upright_and_in_rgb(tmp_path: Path) -> None:
    image = Image.new("L", (4, 2), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was held on its side.
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(str(tmp_path / "a.png"))
    assert (read.mode, read.size) == ("RGB", (2, 4))


def test_an_image_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 2**16 - 1, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "a.png")
    read = np.asarray(read_image(str(tmp_path / "a.png")))
    assert np.array_equal(read[..., 0], shades >> 8)


def test_a_label_may_be_called_train(tmp_path: Path) -> None:
    folder = save_squares(tmp_path / "vehicles", **{".": 5})
    (folder / "red").rename(folder / "train")
    task = load_task(folder)
    assert set(task.labels) == {"train", *COLOUR_NAMES} - {"red"}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing in train": (
        lambda folder: [shutil.rmtree(path) for path in (folder / "train").iterdir()],
        r"train: there is no folder in it: put the images into a folder for each label",
    ),
    "a label without images": (
        lambda folder: (folder / "train" / "a").mkdir(),
        r"train/a: there is no image in it: add some \(\.png, .*\), or remove the folder",
    ),
    "one label": (
        lambda folder: [shutil.rmtree(folder / "train" / name) for name in ("red", "green")],
        "two or more distinct labels, got deep_blue",
    ),
    "a label that train has not": (
        lambda folder: shutil.copytree(folder / "test" / "red", folder / "test" / "pink"),
        r"test/pink/0\.png: unknown label 'pink'; known are deep_blue, green, red",
    ),
    "a broken image": (
        lambda folder: _cut(folder / "test" / "red" / "1.png"),
        r"test/red/1\.png: cannot be read as an image",
    ),
    "no image at all": (
        lambda folder: (folder / "train" / "red" / "1.png").write_text("a text"),
        r"train/red/1\.png: cannot be read as an image",
    ),
    "an empty file": (
        lambda folder: (folder / "train" / "red" / "1.png").write_bytes(b""),
        r"train/red/1\.png: cannot be read as an image",
    ),
    "two folders for one split": (
        lambda folder: [(folder / name).mkdir() for name in ("val", "dev")],
        "are all for validation",
    ),
    "no train": (
        lambda folder: shutil.rmtree(folder / "train"),
        r"train\.jsonl: missing; .* or a folder train with a folder of images for each label",
    ),
    "a column": (lambda folder: None, "there is no column 'picture'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, case: str) -> None:
    save_squares(tmp_path, train=2, test=2)
    spoil, message = BAD[case]
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_task(tmp_path, text="picture" if case == "a column" else None)
