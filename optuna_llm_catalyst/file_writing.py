"""Files that are whole or as they were."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside the old one, which it replaces once it is whole.

    Args:
        path: The file; its folder is made if need be. A device or a pipe is written, never
            replaced.
        write: Writes a file of a given path. What it raises is passed on.

    Raises:
        OSError: If the file cannot be written.
    """
    path = path.resolve()
    is_file = path.is_file() or not path.exists()
    new = path.with_name(f".{path.name[:200]}.{os.getpid()}") if is_file else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        if is_file:
            os.replace(new, path)
    finally:
        if is_file:
            with suppress(OSError):
                new.unlink(missing_ok=True)
