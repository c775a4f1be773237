"""What is seen of a study while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import sys
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.show import ProposalRecord
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation


class StageProgress:
    """A bar of optimiser steps on a terminal, else one line a stage.

    Args:
        stages: Stages of this run.
        steps: Optimiser steps of each.
        refine_steps: Steps of the last stage that continues the best; 0 for none.

    Attributes:
        n_finished: How many stages of this run ended, failed ones among them.
        n_failed: How many of them failed.
    """

    def __init__(self, *, stages: int, steps: int, refine_steps: int) -> None:
        self.n_finished = 0
        self.n_failed = 0
        self._steps = steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True, width=output.width()),
            disable=not sys.stderr.isatty(),
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
            completed=self.n_finished * self._steps + evaluation.step,
            description=f"stage {trial.number}, loss {evaluation.loss:.3f}, steps",
        )

    def finished(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Says what there is to say of a stage that ended; a callback of ``study.optimize``."""
        del study
        self.n_finished += 1
        self.n_failed += trial.state == TrialState.FAIL
        for line in _lines(trial):
            output.say(line)
        if trial.value is not None and self._bar.disable:
            origin, prompt = (trial.user_attrs.get(key, "") for key in ("origin", "prompt"))
            output.say(f"stage {trial.number}: loss {trial.value:.3f}, {origin}: {prompt}")


def _lines(trial: optuna.trial.FrozenTrial) -> Iterator[str]:
    """Why a stage did not start as planned, or did not end."""
    proposal = records.load(trial, "proposal", ProposalRecord) or ProposalRecord()
    failure, breaker = proposal.failure, proposal.breaker
    if breaker == "open":
        failure = "the LLM failed several times in a row and is left alone for now"
    if failure:
        yield f"stage {trial.number} started from a mutation: {failure}"
    if breaker == "opened":
        yield "the LLM keeps failing: it is tried only now and then until it answers"
    if breaker == "closed":
        yield "the LLM answers again"
    if trial.state == TrialState.FAIL:
        # A stage keeps the best of what it saw: no step can spoil a start that is a number.
        yield (
            f"stage {trial.number} failed: its loss is not a number even before training: look "
            "at the model's weights and the data"
        )
