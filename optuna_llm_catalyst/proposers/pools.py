"""Two pools of candidates: some refine the best prompt, within an edit budget, others explore.

After LEO's pools (arXiv 2403.02054) and GPO's step size (arXiv 2402.17564). The budget is a
request to the LLM, not a filter: what goes beyond it is tried as well, and flagged in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers.base import ProposalRequest


def n_refined(request: ProposalRequest) -> int:
    """How many of the candidates refine the best: half of them, at least one."""
    return (request.n_candidates + 1) // 2


def edit_budget(request: ProposalRequest, horizon: int) -> int:
    """Words of the best prompt that a refining candidate may change.

    Shrinks from all to a fifth of them by a cosine, over ``horizon`` stages:
    ``int(final + (init - final) (1 + cos(π t / T)) / 2)``.
    """
    init = request.space.num_virtual_tokens
    final = max(1, init // 5)
    progress = min(request.history.n_finished / horizon, 1.0)
    return int(final + (init - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def edit_record(
    request: ProposalRequest, horizon: int, prompts: Sequence[RestartPrompt]
) -> dict[str, Any]:
    """How far candidates are from the best prompt, for the trial's record.

    Returns:
        ``edit_budget``, ``edits`` (words changed, one number a candidate) and ``over_budget``
        (indices of refining candidates beyond it); nothing before the first stage.
    """
    best = next(iter(request.history.stages), None)
    if best is None:
        return {}
    limit = edit_budget(request, horizon)
    start = request.space.without_padding(best.prompt).split()
    edits = [n_edits(start, request.space.without_padding(p).split()) for p in prompts]
    over = [i for i in range(min(n_refined(request), len(edits))) if edits[i] > limit]
    return {"edit_budget": limit, "edits": edits, "over_budget": over}


def n_edits(old: Sequence[str], new: Sequence[str]) -> int:
    """Words to insert, delete or replace to come from one text to another (Levenshtein)."""
    row = list(range(len(new) + 1))
    for i, word in enumerate(old, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(new, start=1):
            replaced = diagonal + (word != other)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]
