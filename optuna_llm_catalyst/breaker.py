"""A circuit breaker that needs no memory: an LLM that keeps failing is left alone for a while.

Whether it is open follows from the study's trials, so all workers share it and a restart does not
forget it. Its pauses are counted in trials, not in seconds: a study that is repeated from its
recorded replies asks at the same trials.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna_llm_catalyst.history import Ask


#: Failures in a row that open the breaker.
THRESHOLD = 3
_MAX_PAUSE = 32


def n_failures(asks: Sequence[Ask]) -> int:
    """How many of the last trials that asked failed in a row; open ones do not count."""
    streak = 0
    for ask in reversed(asks):
        if ask.succeeded:
            break
        streak += ask.succeeded is False
    return streak


def is_open(asks: Sequence[Ask], trial_number: int) -> bool:
    """Whether a trial shall do without asking.

    After three failures in a row the next two trials do, then one asks again; when it fails,
    four do, then eight, up to 32. A trial that is asking now counts as the last that failed, so
    that one worker probes and not all of them.

    Args:
        asks: The trials that asked before, oldest first.
        trial_number: The trial that would ask.
    """
    streak = n_failures(asks)
    if streak < THRESHOLD:
        return False
    pause = min(2 << (streak - THRESHOLD), _MAX_PAUSE)
    return trial_number <= asks[-1].trial_number + pause


def transition(asks: Sequence[Ask], *, failed: bool) -> str:
    """What one more answer does to the breaker.

    Args:
        asks: The trials that asked before, oldest first.
        failed: Whether the answer is a failure.

    Returns:
        ``opened``, ``still open``, ``closed`` again, or nothing.
    """
    streak = n_failures(asks)
    if not failed:
        return "closed" if streak >= THRESHOLD else ""
    if streak >= THRESHOLD:
        return "still open"
    return "opened" if streak + 1 == THRESHOLD else ""
