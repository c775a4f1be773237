"""A circuit breaker whose state is computed from the study's trials, so all workers share it.

An LLM that keeps failing gets no requests for a while. The pauses are counted
in trials, so a study that is repeated from recorded replies makes its requests in the same trials.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna_llm_catalyst.history import PastProposal


#: Failures in a row that open the breaker.
THRESHOLD = 3
_MAX_PAUSE = 32


def n_failures(proposals: Sequence[PastProposal]) -> int:
    """How many of the last proposals failed in a row; open ones do not count."""
    streak = 0
    for proposal in reversed(proposals):
        if proposal.succeeded:
            break
        streak += proposal.succeeded is False
    return streak


def is_open(proposals: Sequence[PastProposal], trial_number: int) -> bool:
    """Whether a trial shall do without the proposer.

    After three failures in a row the next two trials do, then one trial tries again; when it
    fails, four do without, then eight, up to 32. A proposal that is being made counts as the last
    that failed, so that one worker tries and not all of them.
    """
    streak = n_failures(proposals)
    if streak < THRESHOLD:
        return False
    pause = min(2 << (streak - THRESHOLD), _MAX_PAUSE)
    return trial_number <= proposals[-1].trial_number + pause


def transition(proposals: Sequence[PastProposal], *, failed: bool) -> str:
    """What one more proposal does: ``opened``, ``still open``, ``closed`` again, or nothing."""
    streak = n_failures(proposals)
    if not failed:
        return "closed" if streak >= THRESHOLD else ""
    if streak >= THRESHOLD:
        return "still open"
    return "opened" if streak + 1 == THRESHOLD else ""
