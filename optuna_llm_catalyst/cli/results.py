"""What ``tune`` says at its end: the stages, the test scores, and where to look further."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import shlex
import sys

import optuna
from rich.table import Table

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.objective import TestScore


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

    def parts() -> Iterator[str | Table]:
        yield from report.stages(rows)
        if "chosen" in numbers:
            yield f"Chosen by validation loss: stage {numbers['chosen']}."
        for name, score in tested.items():
            if score is not None:
                yield (
                    f"  test accuracy of the {name} stage ({numbers[name]}): "
                    f"{score.accuracy:.1%} on {score.n_examples} examples"
                )
        yield f"Next: {_dashboard_command(options.storage, options.artifacts)}"

    document = {
        **report.document(study, rows),
        "storage": options.storage,
        "resumed": resumed,
        "first": numbers.get("first"),
        "test": tested,
    }
    output.report(document, parts(), as_json=options.json)


def _test(study: optuna.Study, objective: PromptTuningObjective, number: int) -> TestScore | None:
    store = objective.artifact_store
    try:
        return objective.test(load_soft_prompt(study, trial_number=number, artifact_store=store))
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
