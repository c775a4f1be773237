"""Requests to a proposer, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.proposers import ProposalRequest


def history_of(
    space: PromptSpace,
    ranked: Sequence[tuple[str, float]],
    *,
    in_flight: Sequence[str] = (),
    **fields: Any,
) -> History:
    """A history of stages, best first, that knows of nothing else."""
    points = tuple(
        HistoryPoint(space.from_text(text), "stage", number, value)
        for number, (text, value) in enumerate(ranked)
    )
    flying = tuple(map(space.from_text, in_flight))
    known = {point.prompt.token_ids for point in points} | {p.token_ids for p in flying}
    defaults: dict[str, Any] = {"n_finished": len(points), "tried": frozenset(known)}
    return History(points=points, in_flight=flying, **{**defaults, **fields})


def request_of(
    space: PromptSpace,
    history: History | None = None,
    *,
    n_candidates: int = 4,
    seed: int = 0,
    trial_number: int = 7,
) -> ProposalRequest:
    return ProposalRequest(space, history or History(), n_candidates, seed, trial_number)
