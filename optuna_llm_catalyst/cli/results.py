"""What ``tune`` says at its end: the stages, the test scores, and where to look further."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
import shlex
import sys
from typing import Any

import optuna

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective


def print_results(
    study: optuna.Study, objective: PromptTuningObjective, options: TuneOptions, *, resumed: bool
) -> None:
    """Prints the study's stages, and tests the chosen and the first one."""
    rows = report.stage_rows(study)
    chosen, first = report.chosen(rows), report.first(rows)
    named = [(name, row) for name, row in (("chosen", chosen), ("first", first)) if row]
    tested = {
        name: _test(study, objective, row.number) for name, row in named if objective.task.test
    }
    if options.json:
        document = {
            "study": study.study_name,
            "storage": options.storage,
            "resumed": resumed,
            "stages": [asdict(row) for row in rows],
            "chosen": chosen and chosen.number,
            "first": first and first.number,
            "test": tested,
        }
        output.print_json(document)
        return
    report.print_stages(rows)
    if chosen is not None:
        output.tell(f"Chosen by validation loss: stage {chosen.number}.")
    for name, row in named:
        score = tested.get(name)
        if score is not None:
            output.tell(
                f"  test accuracy of the {name} stage ({row.number}): {score['accuracy']:.1%} "
                f"on {score['n_examples']} examples"
            )
    output.tell(f"Next: {_dashboard_command(options.storage, options.artifacts)}")


def _test(
    study: optuna.Study, objective: PromptTuningObjective, number: int
) -> dict[str, Any] | None:
    try:
        trained = load_soft_prompt(
            study, trial_number=number, artifact_store=objective.artifact_store
        )
        score = objective.test(trained)
    except CheckpointError as error:
        output.say(f"warning: no test score of stage {number}: {error}")
        return None
    return {"loss": score.loss, "accuracy": score.accuracy, "n_examples": score.n_examples}


def _dashboard_command(storage: str, artifacts: Path) -> str:
    """A line that works when it is copied: an environment need not be active."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        program = Path("optuna-dashboard")
    elif program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), storage, "--artifact-dir", str(artifacts)])
