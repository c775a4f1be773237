"""Work in a daemon thread, which does not keep the process alive if nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
import threading
from typing import Any
from typing import TypeVar


T = TypeVar("T")
#: What a cancelled coroutine may take to clean up before it is left to itself.
_GRACE_S = 2.0


def start(work: Callable[[], T]) -> Future[T]:
    """Starts ``work`` in a thread of its own; the future gives its result or its error."""
    outcome: Future[T] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, name="llm-catalyst", daemon=True).start()
    return outcome


def run_within(seconds: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine to its end, or cancels it and raises a TimeoutError.

    It holds whatever a server does: the timeouts of HTTP clients are for one read, and a byte now
    and then is never late. A cancelled coroutine closes its connection, and the server stops
    generating. The thread is for notebooks, which have an event loop running already.
    """
    limit = waitable(seconds)

    async def bounded() -> T:
        return await asyncio.wait_for(work(), limit)

    try:
        return start(lambda: asyncio.run(bounded())).result(limit + _GRACE_S)
    # Python 3.10 has three classes of this name.
    except (asyncio.TimeoutError, FutureTimeoutError) as error:
        raise TimeoutError(f"not done within {seconds:g} seconds") from error


def waitable(seconds: float) -> float:
    """The nearest number of seconds that a thread can wait for: not negative, nor centuries."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX / 2)
