"""A deadline that holds, whatever a server does.

The timeouts of HTTP clients are for one read: a server that sends a byte now and then is never
late. A coroutine can be cancelled at any moment, and the connection closes with it, so that the
server stops generating.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
import threading
from typing import Any
from typing import TypeVar

from optuna_llm_catalyst import background


T = TypeVar("T")
#: What a cancelled coroutine may take to clean up before it is left to itself.
_GRACE_S = 2.0


def waitable(seconds: float) -> float:
    """The nearest number of seconds that a thread can wait for: not negative, nor centuries."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX / 2)


def run_within(seconds: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine to its end, or cancels it when the time is up.

    It runs in a thread of its own, as a notebook has an event loop running already.

    Args:
        seconds: The time it has.
        work: Makes the coroutine.

    Raises:
        TimeoutError: If it took longer.
    """

    limit = waitable(seconds)

    async def bounded() -> T:
        return await asyncio.wait_for(work(), limit)

    try:
        return background.start(lambda: asyncio.run(bounded())).result(limit + _GRACE_S)
    # Python 3.10 has three classes of this name.
    except (asyncio.TimeoutError, FutureTimeoutError) as error:
        raise TimeoutError(f"not done within {seconds:g} seconds") from error
