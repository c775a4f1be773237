"""Ctrl-C between the calls of a study's storage, not within one.

A ``KeyboardInterrupt`` in the middle of a transaction can leave its connection half closed: the
database then stays locked, and Optuna cannot even mark the trial as failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import signal
import threading
import time
from types import FrameType


#: A storage that takes longer hangs, and the user wants to get out.
_MAX_DELAY_S = 5.0
_RETRY_S = 0.001


@contextmanager
def between_storage_calls() -> Iterator[None]:
    """Ctrl-C raises ``KeyboardInterrupt`` as soon as no call of a storage of Optuna runs.

    Outside the main thread, and where somebody else handles the signal, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waits_since: float | None = None

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal waits_since
        now = time.monotonic()
        if waits_since is None:
            waits_since = now
        if _is_in_storage(frame) and now - waits_since < _MAX_DELAY_S:
            retry = threading.Timer(_RETRY_S, _interrupt_main_thread)
            retry.daemon = True
            retry.start()
            return
        waits_since = None
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_in_storage(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("optuna.storages."):
            return True
        frame = frame.f_back
    return False


def _interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):
        # A real signal, which also wakes a thread that waits.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # On Windows.
        signal.raise_signal(signal.SIGINT)
