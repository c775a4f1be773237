"""A circuit breaker that needs no memory: an LLM that keeps failing is left alone for a while.

Whether it is open follows from the study's trials, so all workers share it and a restart does not
forget it. Its pauses are counted in trials, not in seconds: a study that is repeated from its
recorded replies proposals at the same trials.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna_llm_catalyst.history import PastProposal


#: Failures in a row that open the breaker.
THRESHOLD = 3
_MAX_PAUSE = 32


def n_failures(proposals: Sequence[PastProposal]) -> int:
    """How many of the last trials that asked failed in a row; open ones do not count."""
    streak = 0
    for ask in reversed(proposals):
        if ask.succeeded:
            break
        streak += ask.succeeded is False
    return streak


def is_open(proposals: Sequence[PastProposal], trial_number: int) -> bool:
    """Whether a trial shall do without asking.

    After three failures in a row the next two trials do, then one proposals again; when it fails,
    four do, then eight, up to 32. A trial that is asking now counts as the last that failed, so
    that one worker probes and not all of them.

    Args:
        proposals: The trials that asked before, oldest first.
        trial_number: The trial that would ask.
    """
    streak = n_failures(proposals)
    if streak < THRESHOLD:
        return False
    pause = min(2 << (streak - THRESHOLD), _MAX_PAUSE)
    return trial_number <= proposals[-1].trial_number + pause


def transition(proposals: Sequence[PastProposal], *, failed: bool) -> str:
    """What one more answer does to the breaker.

    Args:
        proposals: The trials that asked before, oldest first.
        failed: Whether the answer is a failure.

    Returns:
        ``opened``, ``still open``, ``closed`` again, or nothing.
    """
    streak = n_failures(proposals)
    if not failed:
        return "closed" if streak >= THRESHOLD else ""
    if streak >= THRESHOLD:
        return "still open"
    return "opened" if streak + 1 == THRESHOLD else ""
