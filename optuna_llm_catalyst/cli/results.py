"""What ``tune`` says at its end: the stages, and the study's product beside its baselines."""

from __future__ import annotations

from pathlib import Path
import shlex
import sys
from typing import Any

import optuna

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import product_table
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import product
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import significance
from optuna_llm_catalyst.prompt_tuning.comparison import compare
from optuna_llm_catalyst.prompt_tuning.comparison import Row
from optuna_llm_catalyst.prompt_tuning.metrics import TestScore
from optuna_llm_catalyst.prompt_tuning.product import Product
from optuna_llm_catalyst.prompt_tuning.product_store import save_product


def print_results(
    study: optuna.Study, objective: PromptTuningObjective, options: TuneOptions, *, resumed: bool
) -> None:
    """Prints the study's stages and what its ensemble is worth, and keeps the ensemble."""
    rows = report.stage_rows(study)
    # The first complete stage is what prompt tuning without restarts comes to.
    first = next((row for row in rows if row.state == "complete"), None)
    stages = {"chosen": report.chosen(rows), "first": first}
    numbers = {name: row.number for name, row in stages.items() if row}
    tested = {n: _test(study, objective, i) for n, i in numbers.items() if objective.task.test}
    measured, compared = _measure(study, objective) if first else (None, [])
    is_kept = measured is not None and _keep(study, measured, objective)

    parts = report.stages(rows)
    if "chosen" in numbers:
        parts.append(f"Chosen by validation {options.metric}: stage {numbers['chosen']}.")
    if measured:
        parts += _product_parts(measured, compared, objective, is_kept=is_kept)
    parts.append(f"Next: {_dashboard_command(options.storage, options.artifacts)}")
    document = {
        **report.document(study, rows),
        "metric": options.metric,
        "storage": options.storage,
        "resumed": resumed,
        "first": numbers.get("first"),
        "test": tested,
        "product": measured and measured.name,
        "comparison": compared,
    }
    output.report(document, parts, as_json=options.json)


def _measure(
    study: optuna.Study, objective: PromptTuningObjective
) -> tuple[Product | None, list[Row]]:
    """The study's product, and the rows of its comparison."""
    try:
        measured = product.measure(objective, study)
        compared = _compared(measured, objective)
        if compared:
            measured.classifier.table = product_table.markdown(
                compared, product=measured.name, metric=_score_name(objective)
            )
    except CheckpointError as error:
        output.say(f"warning: there is no ensemble: {error}")
        return None, []
    return measured, compared


def _keep(study: optuna.Study, measured: Product, objective: PromptTuningObjective) -> bool:
    """Keeps the product with its study, where `export` finds it; returns whether it could be."""
    try:
        save_product(study, measured.classifier, objective.prompts.artifact_store)
    except CheckpointError as error:
        output.say(f"warning: the ensemble is not kept: {error}. Repeat with --stages 0.")
        return False
    return True


def _compared(measured: Product, objective: PromptTuningObjective) -> list[Row]:
    labels = [example.label for example in objective.task.test]
    found = {name: rows.argmax(-1).cpu().numpy() for name, rows in measured.log_probs.items()}
    score = (
        significance.macro_f1 if _score_name(objective) == "macro-F1" else significance.accuracy
    )
    return compare(labels, found, measured.name, score) if found else []


def _product_parts(
    measured: Product, compared: list[Row], objective: PromptTuningObjective, *, is_kept: bool
) -> list[Any]:
    numbers = measured.classifier.ensemble.numbers
    stages = "1 stage" if len(numbers) == 1 else f"{len(numbers)} stages"
    export = ": export it with `export`" if is_kept else ""
    said = f"The study's classifier is the {measured.name} of {stages}{export}."
    if not compared:
        return [f"There are no test examples, so nothing is measured. {said}"]
    shown = product_table.parts(
        compared,
        product=measured.name,
        metric=_score_name(objective),
        n_examples=len(objective.task.test),
    )
    return [*shown, said]


def _score_name(objective: PromptTuningObjective) -> str:
    """What is measured on the test split; a loss says little to people."""
    return "macro-F1" if objective.metric.name == "macro-f1" else "accuracy"


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
