"""Requests to a proposer, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna_llm_catalyst import DriftWord
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.history import Outcome
from optuna_llm_catalyst.mistakes import EnsembleRecord
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.proposers.sections import SECTIONS
from tests.toy_stage import texts


ALL_SECTIONS = tuple(SECTIONS)
#: Everything that an LLM can be told.
FULL_OPTIONS = MetaPromptOptions(
    "Sort customer messages by what they are about.",
    labels=("billing", "delivery"),
    examples=[("My card was charged twice.", "billing"), ("Where is it?", "delivery")],
    mechanism="Each label is read as `<prompt> <label>`; a text goes to the nearest.",
    n_validation=32,
    n_stages=30,
    sections=ALL_SECTIONS,
)


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


def full_history(space: PromptSpace, n_points: int = 4, *, newest: int = 0) -> History:
    """A history that has something to say in every section.

    Args:
        space: Of three virtual tokens.
        n_points: How many stages, best first.
        newest: The rank of the stage that was the last.
    """
    prompts = [space.from_text(text) for text in texts(n_points + 1)]
    numbers = [*range(n_points)]
    numbers.insert(newest, numbers.pop())
    points = tuple(
        HistoryPoint(
            prompt,
            "stage",
            number,
            value=rank / 10,
            before=1.0,
            accuracy_before=0.25,
            accuracy=0.75,
            swaps=(Swap(0, prompt.text.split()[0], "yellow", -0.2, -0.1),),
            drift=(DriftWord(1, "young", 0.5),),
            mistakes=Mistakes.of(
                ["billing"] * 3, ["delivery"] * 2 + ["billing"], [("Why?", None)] * 3
            ),
        )
        for rank, (number, prompt) in enumerate(zip(numbers, prompts[:-1], strict=True))
    )
    outcomes = sorted(Outcome(p.trial_number, p.prompt.token_ids, p.value) for p in points)
    known = frozenset(prompt.token_ids for prompt in prompts)
    mistakes = Mistakes.of(["delivery"] * 4, ["billing", *["delivery"] * 3], [("Who?", None)] * 4)
    return History(
        points,
        (prompts[-1],),
        known,
        {},
        n_points,
        tuple(outcomes),
        ensemble=EnsembleRecord(n_points, 0.25, 0.875, mistakes),
    )


def request_of(
    space: PromptSpace,
    history: History | None = None,
    *,
    n_candidates: int = 4,
    seed: int = 0,
    trial_number: int = 7,
) -> ProposalRequest:
    return ProposalRequest(space, history or History(), n_candidates, seed, trial_number)
