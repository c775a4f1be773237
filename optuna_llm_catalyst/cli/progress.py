"""What ``tune`` says of a study: while it runs, and at its end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
import shutil
import sys
import tempfile

import optuna
from optuna.trial import BaseTrial
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress
from rich.progress import TaskID

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import recipe
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.show import ProposalRecord
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.planner import described
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import needs_gradient


class StageProgress:
    """A bar of stages on a terminal, and one of the steps of refining; else one line a stage.

    ``bar`` is shown for the time of a ``with`` block. ``n_failed`` of the ``n_finished`` stages
    of this run failed.
    """

    def __init__(self, options: TuneOptions) -> None:
        self.n_finished = 0
        self.n_failed = 0
        self._metric = options.metric
        stage = recipe.stage(options)
        self._budget = stage.budget
        self._unit = "steps" if needs_gradient(stage) else "queries"
        self.bar = Progress(
            console=Console(stderr=True, width=output.width()),
            disable=not sys.stderr.isatty(),
        )
        self._stages = self.bar.add_task("stages", total=options.stages)
        self._refining: TaskID | None = None

    def evaluated(self, trial: BaseTrial, evaluation: Evaluation) -> None:
        """Moves the bar; the objective calls this at each evaluation."""
        description = (
            f"stage {trial.number}, {self._metric} {report.told(self._metric, evaluation.value)}"
        )
        if self._refining is not None:
            self.bar.update(
                self._refining, completed=evaluation.step, description=f"refining, {description}"
            )
            return
        if evaluation.step == 0:  # Stages that train a text prompt may be longer.
            self._budget = report.budget_of(trial) or self._budget
        done = self.n_finished + evaluation.step / max(self._budget, 1)
        self.bar.update(self._stages, completed=done, description=description)

    def refine(self, n_steps: int) -> None:
        """Starts the bar of refining, and says that it starts."""
        self._refining = self.bar.add_task("refining", total=n_steps)
        output.say(f"Refining the best stage for {n_steps} {self._unit} at most.")

    def finished(self, _: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Says what there is to say of a stage that ended; a callback of ``study.optimize``."""
        self.n_finished += 1
        name = f"stage {trial.number}"
        proposal = records.load(trial, "proposal", ProposalRecord) or ProposalRecord()
        failure = proposal.failure
        if proposal.breaker == "open":
            failure = "the LLM failed several times in a row and is left alone for now"
        if failure:
            origin = str(trial.user_attrs.get("origin", ""))
            output.say(f"{name} started from {described(origin)}: {failure}")
        if proposal.breaker == "opened":
            output.say("the LLM keeps failing: it is tried only now and then until it answers")
        if proposal.breaker == "closed":
            output.say("the LLM answers again")
        if trial.state == TrialState.FAIL:
            self.n_failed += 1
            # A stage returns its best evaluation, so NaN means that the first one was NaN.
            output.say(
                f"{name} failed: its loss is not a number even before training: look at the "
                "model's weights and the data"
            )
        if trial.value is not None and self.bar.disable:
            origin, prompt = (trial.user_attrs.get(key, "") for key in ("origin", "prompt"))
            value = report.told(self._metric, trial.value)
            output.say(f"{name}: {self._metric} {value}, {origin}: {prompt}")


def keep_unsaved(objective: PromptTuningObjective, artifacts: Path) -> None:
    """Writes the prompts that could not be stored where there is room, or says that they are lost.

    A full disk may have room again, or another one has.
    """
    unsaved = objective.prompts.unsaved
    for place in (artifacts, Path(), Path(tempfile.gettempdir())) if unsaved else ():
        if paths := _written(objective, place):
            output.say(
                f"The soft prompts that could not be stored are in {paths[0].parent}: "
                f"{', '.join(path.name for path in paths)}. `export` does not find them."
            )
            return
    if unsaved:
        stages = ", ".join(str(number) for _, number in unsaved)
        output.say(
            f"warning: the soft prompts of the stages {stages} are lost, as no disk has room: "
            "make room and run as many stages again."
        )


def _written(objective: PromptTuningObjective, place: Path) -> list[Path]:
    with suppress(OSError):
        # A new folder, as another study may have left prompts there.
        folder = tempfile.mkdtemp(prefix="soft_prompts_", dir=place)
        try:
            return objective.prompts.save_unsaved(folder)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
    return []
