"""Work beside the caller's, in a thread that does not keep an interrupted process alive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
import threading
from typing import TypeVar


T = TypeVar("T")


def start(work: Callable[[], T]) -> Future[T]:
    """Starts ``work`` in a daemon thread; the future gives its result or its error.

    An executor's threads are waited for when the process ends, which a request to an LLM that
    nobody wants any more is not worth.
    """
    outcome: Future[T] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, name="llm-catalyst", daemon=True).start()
    return outcome
