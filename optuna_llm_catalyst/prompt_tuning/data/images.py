"""Images: files that Pillow reads, and folders of them to tables.

An image stands in a table, and in an example, as the path of its file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_tuning.data.tables import Table


#: Files that are taken for images.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: Characters of a path that an error shows: it may be any text.
_MAX_NAMED = 200


@dataclass(frozen=True)
class ImageFolders:
    """The images of a task.

    Attributes:
        tables: By split, a table with the columns ``text``, for paths, and ``label``.
        notes: What was left out or found odd, in sentences.
        has_splits: Whether somebody split them; else there is ``train`` alone.
    """

    tables: Mapping[str, Table]
    notes: tuple[str, ...]
    has_splits: bool


def check_pillow() -> None:
    """Raises a DataError if Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError(
            "Pillow, which reads images, is not installed: pip install "
            "'optuna-llm-catalyst[images]'."
        )


def read_image(path: str) -> Any:
    """An image of Pillow in RGB, upright as its camera says.

    Raises:
        DataError: If there is no such file, or it is no image.
    """
    with _opened(path) as image:
        from PIL import ImageOps

        return ImageOps.exif_transpose(_of_eight_bits(image)).convert("RGB")


def _of_eight_bits(image: Any) -> Any:
    """An image of 16 bits a pixel by its upper 8; Pillow would cut the rest off as white."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    pixels = np.asarray(image)
    return Image.fromarray((pixels.clip(0, 2**16 - 1) >> 8).astype(np.uint8))


def check_image(path: str) -> None:
    """Raises a DataError unless a file is there and starts as an image does; reads no pixels."""
    with _opened(path) as image:
        image.verify()


def write_blank_image(path: Path) -> None:
    """Writes a small image, to try a model with."""
    check_pillow()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(path)


def holds_folders(folder: Path) -> bool:
    """Whether there is a folder in a folder."""
    return bool(_folders(folder))


def holds_labels(folder: Path) -> bool:
    """Whether any folder in a folder holds images. Folders in these are not looked at."""
    with _folder_errors(folder):
        return any(_is_image(p, folder) for label in _folders(folder) for p in label.iterdir())


def read_folders(splits: Mapping[str, Path], *, has_splits: bool = True) -> ImageFolders:
    """Reads the folders of splits, which hold a folder of images for each label.

    Of training images with the same bytes the first is kept.

    Args:
        splits: The folders; ``train`` comes first.
        has_splits: Whether somebody split the images.

    Raises:
        DataError: Names the folder or the file, what is wrong and what to do.
    """
    found = {split: _labelled(folder) for split, folder in splits.items()}
    paths = [path for labelled in found.values() for path in labelled]
    for path in paths:
        check_image(path)
    first = _first_of_same_bytes(paths)
    train = found["train"]
    found["train"] = {path: label for path, label in train.items() if first[path] == path}
    notes = [*_dropped(train, first), *_shared(found, first)]
    tables = {split: _table(splits[split], labelled) for split, labelled in found.items()}
    return ImageFolders(tables, tuple(notes), has_splits)


def _dropped(train: Mapping[str, str], first: Mapping[str, str]) -> Iterator[str]:
    repeated = [path for path in train if first[path] != path]
    n_contradicting = sum(train[path] != train[first[path]] for path in repeated)
    other = f", {n_contradicting} of them under another label" if n_contradicting else ""
    if repeated:
        yield f"Repeated images were dropped from train: {len(repeated)}{other}."


def _shared(found: Mapping[str, Mapping[str, str]], first: Mapping[str, str]) -> Iterator[str]:
    """What to say of images that are in the training split and in another one, too."""
    for split in [split for split in found if split != "train"]:
        if count := sum(first[path] in found["train"] for path in found[split]):
            yield (
                f"{count} images of {split} are in train, too: its values look better than they "
                "are."
            )


def _labelled(folder: Path) -> dict[str, str]:
    """The paths of a split's images, each with its label: the name of its folder."""
    labels = _folders(folder)
    if not labels:
        raise DataError(
            f"{folder}: there is no folder in it: put the images into a folder for each label, "
            f"such as {folder / 'cat' / '1.png'}."
        )
    found: dict[str, str] = {}
    for label in labels:
        images = _images(label)
        if not images:
            raise DataError(
                f"{label}: there is no image in it: add some ({', '.join(IMAGE_SUFFIXES)}), or "
                "remove the folder."
            )
        found |= dict.fromkeys(map(str, images), label.name)
    return found


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but hidden ones."""
    with _folder_errors(folder):
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The images in a folder and in the folders in it, but hidden ones."""
    with _folder_errors(folder):
        return sorted(path for path in folder.rglob("*") if _is_image(path, folder))


def _is_image(path: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden and path.is_file()


def _table(folder: Path, labelled: Mapping[str, str]) -> Table:
    paths = list(labelled)
    columns = {"text": paths, "label": list(labelled.values())}
    name = str(folder)
    return Table(name, tuple(columns), len(paths), columns.__getitem__, paths.__getitem__)


def _first_of_same_bytes(paths: Sequence[str]) -> dict[str, str]:
    """By path, the first one whose file has the same bytes."""
    sizes = {path: os.path.getsize(path) for path in paths}  # Most tell files apart already.
    counts = Counter(sizes.values())
    first: dict[str, str] = {}

    def key(path: str) -> str:
        return path if counts[sizes[path]] == 1 else _digest(path)

    return {path: first.setdefault(key(path), path) for path in paths}


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """An image of Pillow, whose pixels are not read yet."""
    check_pillow()
    from PIL import Image

    named = one_line(path[:_MAX_NAMED])
    if not os.path.isfile(path):
        raise DataError(f"{named}: no such file. The model reads images: give the path of one.")
    try:
        with Image.open(path) as image:
            yield image
    # Of a broken file Pillow's readers raise what they like, SyntaxError included.
    except Exception as error:
        raise DataError(f"{named}: cannot be read as an image: {first_line(error)}.") from error
