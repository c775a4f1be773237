"""What stages share that ask a model for log-probabilities only, and have a budget of queries."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from typing import TypeVar

from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stages.base import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult


Queries = TypeVar("Queries", bound="QueryStage")


class QueryStage:
    """A stage whose budget is its field ``n_queries``; of these it asks for no gradient."""

    n_queries: int

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def budget(self) -> int:
        return self.n_queries

    def with_budget(self: Queries, budget: int) -> Queries:
        stage: Any = self  # A dataclass, as every stage of these is.
        changed: Queries = replace(stage, n_queries=budget)
        return changed


def evaluated(
    run: Run,
    start: Prompt,
    moves: Iterable[tuple[int, Prompt]],
    *,
    last: int,
    eval_every: int,
    is_over: Callable[[Evaluation], bool] = lambda _: False,
) -> StageResult:
    """Evaluates a start and, now and then, what a search moves to; the best of them counts.

    Args:
        run: The stage's run.
        start: The prompt to start from.
        moves: After each move, the queries spent until then and the prompt.
        last: The queries spent after the last move, which is always evaluated.
        eval_every: Queries between two evaluations.
        is_over: Whether the search has come to its end with an evaluation.
    """
    best = now = run.evaluate(start, 0)
    stopped, spent = run.observe(now), 0
    if not stopped:
        for spent, prompt in moves:
            if spent == last or spent - now.step >= eval_every:
                now = run.evaluate(prompt, spent)
                best = now if run.is_better(now, best) else best
                stopped = run.observe(now)
                if stopped or is_over(now):
                    break
    return StageResult(best, spent, stopped)
