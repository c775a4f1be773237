"""Optuna's journal files, opened so that a process that died leaves no harm behind.

A process that is killed, or a full disk, can leave half a line at the end of a journal, and a
lock. Optuna appends to the half line, after which no line of the file can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
import os
from pathlib import Path
import time

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileSymlinkLock

from optuna_llm_catalyst.cli import output


#: Writing takes milliseconds. A lock is said to be waited for, and is taken from who holds it.
_SAID_AFTER_S = 3.0
_TAKEN_AFTER_S = 30.0
_PAUSE_S = 0.01
_FIRST_BYTES = b'{"op_code"'


def open_journal(path: Path) -> JournalStorage:
    """Opens a journal by its absolute path: a lock holds the path as it was opened by."""
    if path.exists():
        with path.open("rb") as file:
            # A truncated journal may be shorter than this.
            if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
                raise output.UserError(
                    f"storage {str(path)!r}: this file is not a journal of Optuna."
                )
    absolute = str(path.absolute())
    return JournalStorage(JournalFileBackend(absolute, JournalLock(absolute)))


class JournalLock(JournalFileSymlinkLock):
    """Optuna's lock that says when it waits, and whose holder may append to the file.

    Optuna's own waits for ever for a lock whose link leads nowhere.
    """

    def __init__(
        self,
        path: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(path)
        self._clock = clock
        self._sleep = sleep

    def acquire(self) -> bool:
        started = since = self._clock()
        holder, is_said = None, False
        while True:
            with suppress(FileExistsError):
                os.symlink(self._lock_target_file, self._lock_file)
                break
            now, current = self._clock(), self._holder()
            if current != holder:
                holder, since = current, now
            if now - started > _SAID_AFTER_S and not is_said:
                output.say(
                    f"Waiting for {self._lock_file}: another process writes, or died while it "
                    f"wrote; then the lock is taken over after {_TAKEN_AFTER_S:.0f} s."
                )
                is_said = True
            # Another waiter may have taken it over just now.
            if now - since > _TAKEN_AFTER_S and current and self._holder() == current:
                with suppress(RuntimeError):  # Another one took it.
                    self.release()
            self._sleep(_PAUSE_S)
        try:
            _set_torn_line_aside(Path(self._lock_target_file))
        except BaseException:
            self.release()
            raise
        return True

    def _holder(self) -> tuple[int, int] | None:
        """What tells a lock's holder from the next: each makes a new link."""
        with suppress(FileNotFoundError):
            status = os.lstat(self._lock_file)
            return status.st_ino, status.st_mtime_ns
        return None


def _set_torn_line_aside(path: Path) -> None:
    """Moves an unfinished last line of a journal to a file beside it. Needs the journal's lock."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size == 0 or file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        aside = path.with_name(f"{path.name}.torn")
        with aside.open("ab") as torn:
            torn.write(content[end:] + b"\n")
        file.truncate(end)
    output.say(
        f"{path} ended in an unfinished line, of a process that died while it wrote or of a full "
        f"disk: its {size - end} bytes are now in {aside.name}."
    )
