"""Texts, or pairs of texts, as users hand them over: checked, and with an error that names one."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Set
import os
import reprlib

import numpy as np

from optuna_llm_catalyst.prompt_tuning.data import Example


#: The label of texts whose label is not known.
UNKNOWN = 0


def read_texts(texts: Iterable[object], *, pairs: bool | None = None) -> list[Example]:
    """Reads a list, a tuple, an array or a series of texts, or of pairs of texts.

    Args:
        texts: The texts. A pair is a tuple, a list or a row of two; a tuple of two texts is two
            texts.
        pairs: Whether they must be pairs; by default the first text decides.

    Raises:
        ValueError: If they are no such collection, or one of them is no text; it is named.
    """
    examples = [read_text(given, f"`texts[{i}]`") for i, given in enumerate(_collection(texts))]
    for i, example in enumerate(examples):
        expected = examples[0].text_pair is not None if pairs is None else pairs
        check_pair(example, f"`texts[{i}]`", pairs=expected)
    return examples


def read_text(given: object, name: str) -> Example:
    """Reads one text, or a pair; ``name`` is what an error calls it.

    Raises:
        ValueError: If it is no text, is empty, or holds half a character.
    """
    if isinstance(given, str):
        return Example(_checked(given, name), UNKNOWN)
    if isinstance(given, tuple | list | np.ndarray) and getattr(given, "ndim", 1) == 1:
        texts = [_checked(part, name) for part in given if isinstance(part, str)]
        if len(given) == len(texts) == 2:
            return Example(texts[0], UNKNOWN, texts[1])
    raise ValueError(
        f"{name} is {reprlib.repr(given)}, of type {type(given).__name__}: give a text, or a pair "
        "of texts as a tuple."
    )


def read_paths(paths: Iterable[object]) -> list[Example]:
    """Reads a list, a tuple, an array or a series of paths of images.

    Raises:
        ValueError: If they are no such collection, or one of them is no path; it is named.
    """
    return [_read_path(given, f"`texts[{i}]`") for i, given in enumerate(_collection(paths))]


def _read_path(given: object, name: str) -> Example:
    if not isinstance(given, str | os.PathLike):
        raise ValueError(
            f"{name} is {reprlib.repr(given)}, of type {type(given).__name__}: give the path of "
            "an image."
        )
    return Example(_checked(os.fspath(given), name), UNKNOWN)


def check_pair(example: Example, name: str, *, pairs: bool) -> None:
    """Raises a ValueError unless an example is a pair where pairs are read, and else none."""
    if pairs and example.text_pair is None:
        raise ValueError(
            f"{name} is a single text, but pairs of texts are read: give it a second."
        )
    if not pairs and example.text_pair is not None:
        raise ValueError(f"{name} is a pair of texts, but single texts are read: give one.")


def _collection(texts: Iterable[object]) -> Iterable[object]:
    kind = type(texts).__name__
    if isinstance(texts, str | bytes):
        raise ValueError(f"`texts` is one text, {reprlib.repr(texts)}: put it into a list.")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):
        raise ValueError(
            f"`texts` is of type {kind}: give a list, or one column, such as frame['text']."
        )
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
        raise ValueError(
            f"`texts` is {reprlib.repr(texts)}, of type {kind}: give a list of texts."
        )
    return texts


def _checked(text: str, name: str) -> str:
    if not text.strip():
        raise ValueError(f"{name} is empty: leave it out, or give it words.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {ascii(text[error.start])} at {error.start}, as a cut "
            "emoji leaves it: remove it."
        ) from error
    return str(text)  # NumPy has texts of its own.
