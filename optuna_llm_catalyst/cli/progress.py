"""What is seen of a study while it runs."""

from __future__ import annotations

from collections.abc import Iterator
import sys
from typing import Any

import optuna
from optuna.trial import TrialState
from rich import progress
from rich.console import Console

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.cli.show import ProposalRecord
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation


class StageProgress:
    """A bar of optimiser steps on a terminal, else one line a stage.

    Attributes:
        bar: The bar, shown for the time of a ``with`` block.
        n_finished: How many stages of this run ended, failed ones among them.
        n_failed: How many of them failed.
    """

    def __init__(self, options: TuneOptions) -> None:
        self.n_finished = 0
        self.n_failed = 0
        self._steps = options.steps
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=Console(stderr=True, width=output.width()),
            disable=not sys.stderr.isatty(),
        )
        total = options.stages * options.steps + options.refine_steps
        self._task = self.bar.add_task("steps", total=total)

    def evaluated(self, trial: Any, evaluation: Evaluation) -> None:
        """Moves the bar; the objective calls this at each evaluation."""
        self.bar.update(
            self._task,
            completed=self.n_finished * self._steps + evaluation.step,
            description=f"stage {trial.number}, loss {evaluation.loss:.3f}, steps",
        )

    def finished(self, _: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Says what there is to say of a stage that ended; a callback of ``study.optimize``."""
        self.n_finished += 1
        self.n_failed += trial.state == TrialState.FAIL
        for line in _lines(trial):
            output.say(line)
        if trial.value is not None and self.bar.disable:
            origin, prompt = (trial.user_attrs.get(key, "") for key in ("origin", "prompt"))
            output.say(f"stage {trial.number}: loss {trial.value:.3f}, {origin}: {prompt}")


def _lines(trial: optuna.trial.FrozenTrial) -> Iterator[str]:
    """Why a stage did not start as planned, or did not end."""
    proposal = records.load(trial, "proposal", ProposalRecord) or ProposalRecord()
    failure = proposal.failure
    if proposal.breaker == "open":
        failure = "the LLM failed several times in a row and is left alone for now"
    if failure:
        yield f"stage {trial.number} started from a mutation: {failure}"
    if proposal.breaker == "opened":
        yield "the LLM keeps failing: it is tried only now and then until it answers"
    if proposal.breaker == "closed":
        yield "the LLM answers again"
    if trial.state == TrialState.FAIL:
        # A stage keeps the best of what it saw: no step can spoil a start that is a number.
        yield (
            f"stage {trial.number} failed: its loss is not a number even before training: look "
            "at the model's weights and the data"
        )
