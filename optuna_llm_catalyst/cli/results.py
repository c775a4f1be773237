"""What ``tune`` says at its end: the stages, the test scores, and where to look further."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
import shlex
import shutil
import sys
from typing import Any
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.exceptions import CheckpointError


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective


def print_results(
    study: optuna.Study,
    objective: PromptTuningObjective,
    *,
    storage: str,
    artifacts: Path,
    resumed: bool,
    as_json: bool,
) -> None:
    """Prints the study's stages, and tests the chosen and the first one."""
    rows = report.stage_rows(study)
    chosen, first = report.chosen(rows), report.first(rows)
    named = [(name, row) for name, row in (("chosen", chosen), ("first", first)) if row]
    tested = {
        name: _test(study, objective, row.number) for name, row in named if objective.task.test
    }
    if as_json:
        document = {
            "study": study.study_name,
            "storage": storage,
            "resumed": resumed,
            "stages": [asdict(row) for row in rows],
            "chosen": chosen and chosen.number,
            "first": first and first.number,
            "test": tested,
        }
        report.print_json(document)
        return
    console = Console(highlight=False)
    console.print(report.stage_table(rows))
    if chosen is not None:
        console.print(f"Chosen by validation loss: stage {chosen.number}.")
    for name, row in named:
        score = tested.get(name)
        if score is not None:
            console.print(
                f"  test accuracy of the {name} stage ({row.number}): {score['accuracy']:.1%} "
                f"on {score['n_examples']} examples"
            )
    command = _dashboard_command(storage, artifacts)
    console.print(f"Next: {command}", soft_wrap=True, markup=False)


def _test(
    study: optuna.Study, objective: PromptTuningObjective, number: int
) -> dict[str, Any] | None:
    from optuna_llm_catalyst.prompt_tuning import load_soft_prompt

    try:
        trained = load_soft_prompt(
            study, trial_number=number, artifact_store=objective.artifact_store
        )
        score = objective.test(trained)
    except CheckpointError as error:
        print(f"warning: no test score: {error}", file=sys.stderr)
        return None
    return {"loss": score.loss, "accuracy": score.accuracy, "n_examples": score.n_examples}


def _dashboard_command(storage: str, artifacts: Path) -> str:
    program = "optuna-dashboard"
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) is None and beside.exists():
        program = str(
            beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
        )
    return shlex.join([program, storage, "--artifact-dir", str(artifacts)])
