"""A task by name: a file, a folder, a data set of the hub, or the demo."""

from __future__ import annotations

from dataclasses import dataclass
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
    name = str(source)
    if name.startswith(PREFIX):
        called, splits = load_hub(name)
        tables, card, strict = tables_of(splits, name), Card(called), False
    elif os.path.isfile(source) and name != _DEMO:
        path = Path(source)
        tables, card, strict = {"train": read_table(path)}, Card(path.stem), False
    else:
        folder = _folder(name)
        card = _read_card(folder)
        tables, strict = _read_splits(folder), True
    named = NamedColumns(text, label, text_pair)
    return make_task(tables, named, card, seed=seed, strict=strict)


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


def _read_splits(folder: Path) -> dict[str, Table]:
    try:
        files = [Path(name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from error
    named = {str(file): file.stem for file in files if file.suffix.lower() in SUFFIXES}
    picked = pick_splits(named, str(folder))
    if "train" not in picked:
        raise DataError(
            f"{folder / 'train.jsonl'}: missing; a task needs it, or another file train of the "
            f"kinds {', '.join(SUFFIXES)}."
        )
    return {split: read_table(folder / name) for split, name in picked.items()}
