"""A task: label names, and examples in three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from optuna_llm_catalyst.exceptions import DataError


SPLITS = ("train", "validation", "test")
MAX_LABEL = 200
_MAX_LISTED = 20


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and the index of its label.

    For models that read images, the text is the path of one.
    """

    text: str
    label: int
    text_pair: str | None = None


@dataclass(frozen=True)
class Task:
    """Label names and splits.

    Lists are taken for tuples. For texts and labels as they come, see :func:`task_from_texts`
    and :func:`task_from_table`.

    Attributes:
        name: Name of the task, for people.
        labels: Two or more distinct label names; an example's label is an index into them.
        train: What stages train on; never empty.
        validation: What prompts are selected by; :func:`draw_splits` draws one.
        test: What is reported; may be empty. Never used for selection.
        description: What the task is, in a sentence; may be empty.
        drawn: Which of the splits were drawn from the training examples, and not given.
        notes: What was guessed, dropped or found odd in the data, in sentences.
        of_images: Whether the texts of the examples are paths of images.

    Raises:
        DataError: If a label has no name, two labels have the same, there is no training
            example, some examples are pairs and some are not, or an example has an empty text or
            a label that is no index. The message names the example, as ``train[3]``.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    description: str = ""
    drawn: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    of_images: bool = False

    def __post_init__(self) -> None:
        for name in ("labels", *SPLITS):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        where = f"task {self.name!r}"
        check_names(self.labels, where)
        if not self.train:
            raise DataError(f"{where}: `train` is empty, a task needs training examples.")
        examples = {
            f"{where}: {split}[{i}]": example
            for split in SPLITS
            for i, example in enumerate(getattr(self, split))
        }
        for place, example in examples.items():
            if problem := _problem(example, len(self.labels)):
                raise DataError(f"{place} {problem}.")
        check_pairs({place: example.text_pair for place, example in examples.items()})


def check_names(names: Sequence[str], where: str) -> None:
    """Raises a DataError unless these are two or more distinct names for labels."""
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{where}: the label {name!r} must be a text.")
        if not 1 <= len(name.strip()) <= MAX_LABEL:
            raise DataError(
                f"{where}: the label {name[:40]!r} has {len(name.strip())} characters: give it a "
                f"name of 1 to {MAX_LABEL}."
            )
        if half := half_character(name):
            raise DataError(f"{where}: the label {name[:40]!r} {half}.")
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{where}: a task needs two or more distinct labels, got {listed(names)}.")


def check_pairs(seconds: dict[str, str | None]) -> None:
    """Raises a DataError unless all places have a second text, or none has."""
    pair = next((place for place, second in seconds.items() if second), None)
    single = next((place for place, second in seconds.items() if not second), None)
    if pair and single:
        raise DataError(
            f'{single}: there is no "text_pair", but {pair} has one: all rows or none need it.'
        )


def half_character(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot write, None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        return (
            f"has half a character, {half} at {error.start}, as a cut emoji leaves it: remove it"
        )
    return None


def listed(names: Sequence[str]) -> str:
    """The first names, with commas between."""
    return ", ".join(names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")


def _problem(example: Example, n_labels: int) -> str | None:
    """What is wrong with an example, None if nothing is."""
    for text in (example.text, example.text_pair or ""):
        if not isinstance(text, str):
            return f"has {text!r} where a text must be"
        if half := half_character(text):
            return half
    if not example.text.strip():
        return "has an empty text"
    # A bool is an int to Python; a NumPy integer is none, and is written in another way.
    if type(example.label) is not int:
        return f"has the label {example.label!r}, it must be an index: a Python integer"
    if not 0 <= example.label < n_labels:
        return f"has the label {example.label}, {n_labels} label names have 0 … {n_labels - 1}"
    return None
