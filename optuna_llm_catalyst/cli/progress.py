"""What is seen of a study while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from typing import TYPE_CHECKING

import optuna
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli.report import printable


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning.stages import Evaluation


class StageProgress:
    """A bar of optimiser steps on a terminal, else one line a stage.

    Args:
        console: Where to show it.
        stages: Stages of this run.
        steps: Optimiser steps of each.
        refine_steps: Steps of the last stage that continues the best; 0 for none.
    """

    def __init__(self, console: Console, *, stages: int, steps: int, refine_steps: int) -> None:
        self.console = console
        self._steps = steps
        self._n_finished = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=stages * steps + refine_steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar for the time of a ``with`` block."""
        with self._bar:
            yield

    def evaluated(self, trial: Any, evaluation: Evaluation) -> None:
        """Moves the bar; the objective calls this at each evaluation."""
        self._bar.update(
            self._task,
            completed=self._n_finished * self._steps + evaluation.step,
            description=f"stage {trial.number}, loss {evaluation.loss:.3f}, steps",
        )

    def finished(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Says what is to be said of a finished stage; a callback of ``study.optimize``."""
        del study
        self._n_finished += 1
        proposal = records.load(trial, "proposal", dict[str, Any]) or {}
        failure, breaker = proposal.get("failure"), proposal.get("breaker")
        if failure and breaker != "still open":
            self._say(f"stage {trial.number} started from a mutation: {failure}")
        if breaker == "opened":
            self._say("the LLM keeps failing: it is asked now and then only until it answers")
        if breaker == "closed":
            self._say("the LLM answers again")
        if trial.value is None:
            self._say(f"stage {trial.number} failed: its loss is not a number; try a lower --lr")
        elif not self.console.is_terminal:
            origin, prompt = (trial.user_attrs.get(key, "") for key in ("origin", "prompt"))
            self._say(f"stage {trial.number}: loss {trial.value:.3f}, {origin}: {prompt}")

    def _say(self, line: str) -> None:
        self.console.print(printable(line), markup=False, soft_wrap=True)
