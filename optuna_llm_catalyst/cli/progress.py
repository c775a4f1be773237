"""What ``tune`` says of a study: while it runs, and at its end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
import shlex
import shutil
import sys
import tempfile
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.cli.show import ProposalRecord
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.planner import described
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.objective import TestScore
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation


class StageProgress:
    """A bar of optimiser steps on a terminal, else one line a stage.

    ``bar`` is shown for the time of a ``with`` block. ``n_failed`` of the ``n_finished`` stages
    of this run failed.
    """

    def __init__(self, options: TuneOptions) -> None:
        self.n_finished = 0
        self.n_failed = 0
        self._steps = options.steps
        self.bar = Progress(
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
            description=f"stage {trial.number}, loss {evaluation.loss:.3f}",
        )

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
            output.say(f"{name}: loss {trial.value:.3f}, {origin}: {prompt}")


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


def print_results(
    study: optuna.Study, objective: PromptTuningObjective, options: TuneOptions, *, resumed: bool
) -> None:
    """Prints the study's stages, and tests the chosen and the first one."""
    rows = report.stage_rows(study)
    # The first complete stage is what prompt tuning without restarts comes to.
    first = next((row for row in rows if row.state == "complete"), None)
    stages = {"chosen": report.chosen(rows), "first": first}
    numbers = {name: row.number for name, row in stages.items() if row}
    tested = {n: _test(study, objective, i) for n, i in numbers.items() if objective.task.test}

    parts = report.stages(rows)
    if "chosen" in numbers:
        parts.append(f"Chosen by validation loss: stage {numbers['chosen']}.")
    for name, score in tested.items():
        if score is not None:
            parts.append(
                f"  test accuracy of the {name} stage ({numbers[name]}): {score.accuracy:.1%} "
                f"on {score.n_examples} examples"
            )
    parts.append(f"Next: {_dashboard_command(options.storage, options.artifacts)}")
    document = {
        **report.document(study, rows),
        "storage": options.storage,
        "resumed": resumed,
        "first": numbers.get("first"),
        "test": tested,
    }
    output.report(document, parts, as_json=options.json)


def _test(study: optuna.Study, objective: PromptTuningObjective, number: int) -> TestScore | None:
    try:
        return objective.test(objective.prompts.load(study, number))
    except CheckpointError as error:
        output.say(f"warning: no test score of stage {number}: {error}")
        return None


def _dashboard_command(storage: str, artifacts: Path) -> str:
    """A line that works when it is copied: an environment need not be active."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        program = Path("optuna-dashboard")
    elif program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), storage, "--artifact-dir", str(artifacts)])
