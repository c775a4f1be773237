"""A task by name: a file, a folder, a data set of the hub, or the demo."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
import os
from pathlib import Path

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning.data.assembly import Card
from optuna_llm_catalyst.prompt_tuning.data.assembly import make_task
from optuna_llm_catalyst.prompt_tuning.data.assembly import pick_splits
from optuna_llm_catalyst.prompt_tuning.data.files import parse_json
from optuna_llm_catalyst.prompt_tuning.data.files import read_table
from optuna_llm_catalyst.prompt_tuning.data.files import read_text
from optuna_llm_catalyst.prompt_tuning.data.files import SUFFIXES
from optuna_llm_catalyst.prompt_tuning.data.hub import load_hub
from optuna_llm_catalyst.prompt_tuning.data.hub import PREFIX
from optuna_llm_catalyst.prompt_tuning.data.images import holds_folders
from optuna_llm_catalyst.prompt_tuning.data.images import holds_labels
from optuna_llm_catalyst.prompt_tuning.data.images import ImageFolders
from optuna_llm_catalyst.prompt_tuning.data.images import read_folders
from optuna_llm_catalyst.prompt_tuning.data.memory import tables_of
from optuna_llm_catalyst.prompt_tuning.data.tables import NamedColumns
from optuna_llm_catalyst.prompt_tuning.data.tables import Table
from optuna_llm_catalyst.prompt_tuning.data.task import half_character
from optuna_llm_catalyst.prompt_tuning.data.task import Task


_DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[2] / "demo" / "customer_support"


@dataclass(frozen=True)
class _CardFile:
    task: str | None = None
    description: str | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        for text in (self.task or "", self.description or "", *(self.labels or ())):
            if half := half_character(text):
                raise ValueError(f'"card" {half}')


def load_task(
    source: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    seed: int = 0,
) -> Task:
    """Loads a task and checks it whole.

    - **A file** (``.csv``, ``.tsv``, ``.jsonl``, ``.json`` with a row a line, ``.parquet``) is
      split by label into 60 % to train, 20 % to validate and 20 % to test. Rows without a text
      and repeated texts are dropped; ``task.notes`` counts them.
    - **A folder** holds a file ``train`` of any of these kinds, and if there are such
      ``validation`` and ``test``. A validation split that is missing is drawn from ``train``.
      The names of labels may be in ``card.json``: ``{"labels": [...], "task": ...,
      "description": ...}``; a row's label is a name or an index into them. Otherwise labels are
      those of ``train``, in their order. A row without a text is an error.
    - **A folder of images** has a folder ``train`` with a folder of images for each label,
      ``train/cat/1.png``, and if there are such ``validation`` and ``test``. If it has folders of
      labels itself, ``cat/1.png``, it is split as a file is. The text of an example is the path
      of its image, for :class:`CLIPClassifier`.
    - ``hf:NAME``, ``hf:NAME:CONFIG``, ``hf:NAME@REVISION`` are **data sets of the Hugging Face
      hub**, read by the library ``datasets``. Without a validation split it is drawn; one split
      alone is split in three; a test split without labels is left out.
    - ``demo`` is the task that comes with the package, unless there is a file or a folder of that
      name.

    Args:
        source: What to load.
        text: Column of the texts. By default ``text``, or the only one that is called like one.
        text_pair: Column of second texts, for tasks on pairs.
        label: Column of the labels. By default ``label``, or the only one that is called so.
        seed: Seed of the draw of splits that are missing.

    Raises:
        DataError: Names the file, the line, what is wrong and what to do.
    """
    name, named = str(source), NamedColumns(text, label, text_pair)
    if name.startswith(PREFIX):
        called, splits = load_hub(name)
        return make_task(tables_of(splits, name), named, Card(called), seed=seed, strict=False)
    if os.path.isfile(source) and name != _DEMO:
        path = Path(source)
        return make_task(
            {"train": read_table(path)}, named, Card(path.stem), seed=seed, strict=False
        )
    folder = _folder(name)
    card, found = _read_card(folder), _read_splits(folder)
    if not isinstance(found, ImageFolders):
        return make_task(found, named, card, seed=seed, strict=True)
    task = make_task(found.tables, named, card, seed=seed, strict=found.has_splits)
    return replace(task, notes=(*found.notes, *task.notes), of_images=True)


def _folder(name: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if name == _DEMO:
        return DEMO_FOLDER
    problem = "no such file" if name.lower().endswith(SUFFIXES) else "no such folder"
    raise DataError(
        f"{name}: {problem}; give a folder that holds train.jsonl (or .csv, .tsv, .parquet) and, "
        "if you have them, validation, test and card.json; or such a file, hf:NAME or demo."
    )


def _read_card(folder: Path) -> Card:
    path = folder / "card.json"
    text = read_text(path)
    found = _CardFile()
    if text is not None:
        found = parse_json(_CardFile, text, str(path), "cannot be read as JSON")
    return Card(found.task or folder.name, found.description or "", found.labels, str(path))


def _read_splits(folder: Path) -> dict[str, Table] | ImageFolders:
    try:
        paths = [Path(name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from error
    files = {str(file): file.stem for file in paths if file.suffix.lower() in SUFFIXES}
    picked = pick_splits(files, str(folder))
    if "train" in picked:
        return {split: read_table(folder / name) for split, name in picked.items()}
    folders = {str(path): path.name for path in paths if (folder / path).is_dir()}
    picked = pick_splits(folders, str(folder))
    # A label may be called train, too, which other labels stand beside.
    is_label = len(folders) > len(picked) and not holds_folders(folder / picked.get("train", ""))
    if "train" in picked and not is_label:
        return read_folders({split: folder / name for split, name in picked.items()})
    if (is_label or not picked) and holds_labels(folder):
        return read_folders({"train": folder}, has_splits=False)
    raise DataError(
        f"{folder / 'train.jsonl'}: missing; a task needs it, or another file train of the kinds "
        f"{', '.join(SUFFIXES)}, or a folder train with a folder of images for each label."
    )
