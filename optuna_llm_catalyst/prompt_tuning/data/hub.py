"""Data sets of the Hugging Face hub, or of a folder in its layout, to tables.

The library ``datasets`` finds, checks and caches them. It reads data only: since its version 4 it
refuses data sets that come with a script.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
import os
import re
from typing import Any

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import one_line


PREFIX = "hf:"
_NAME = re.compile(r"(?P<path>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_FORM = "hf:NAME[:CONFIG][@REVISION]"


def load_hub(source: str) -> tuple[str, Mapping[str, Any]]:
    """The name of a data set and its splits, from ``hf:NAME[:CONFIG][@REVISION]``.

    Raises:
        DataError: If ``datasets`` is not installed or cannot load it; the message says why.
    """
    name = source.removeprefix(PREFIX)
    found = _NAME.fullmatch(name)
    parts = {"path": name} if os.path.isdir(name) else found.groupdict() if found else None
    if parts is None:
        raise DataError(f"{source}: the form is {_FORM}.")
    datasets = _library(source)
    with _quiet(datasets):
        try:
            splits: Mapping[str, Any] = datasets.load_dataset(
                parts["path"], parts.get("config"), revision=parts.get("revision")
            )
        # Broken files, servers and proxies raise errors of many libraries.
        except Exception as error:
            reasons = ": ".join(map(_first_lines, filter(None, (error, error.__cause__))))
            raise DataError(
                f"{source}: cannot be loaded: {reasons}. The form is {_FORM}."
            ) from error
    return os.path.basename(parts["path"].rstrip("/")) or name, splits


def _first_lines(error: BaseException) -> str:
    """The first two: what is wrong, and what there is to choose from."""
    lines = str(error).splitlines() or [type(error).__name__]
    return one_line(" ".join(lines[:2]))[:300].rstrip(". ")


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: the library datasets is not installed: pip install "
            "'optuna-llm-catalyst[datasets]'."
        ) from error
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars: a command's lines and its report are what is to be read."""
    shows = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shows:
            datasets.enable_progress_bars()
