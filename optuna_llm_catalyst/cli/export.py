"""``export``: a trained soft prompt out of the study, for use elsewhere."""

from __future__ import annotations

from dataclasses import asdict
import json
from pathlib import Path

from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.studies import load_study


def export(
    output: Path,
    storage: str,
    study_name: str,
    *,
    trial_number: int | None,
    artifacts: Path,
    as_json: bool,
) -> None:
    """Writes ``soft_prompt.safetensors`` and ``prompt.json``."""
    from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
    from optuna_llm_catalyst.prompt_tuning.checkpoints import load_soft_prompt
    from optuna_llm_catalyst.prompt_tuning.checkpoints import write

    study = load_study(storage, study_name)
    rows = report.stage_rows(study)
    best = report.chosen(rows)
    if trial_number is None and best is None:
        raise UserError(f"study {study_name!r} has no complete stage to export yet.")
    number = best.number if trial_number is None and best is not None else trial_number
    if not artifacts.is_dir():
        raise UserError(f"--artifacts {str(artifacts)!r}: no such folder.")
    trained = load_soft_prompt(study, trial_number=number, artifact_store=folder_store(artifacts))
    try:
        output.mkdir(parents=True, exist_ok=True)
        weights, card = output / "soft_prompt.safetensors", output / "prompt.json"
        write(trained, weights)
        stage = next(row for row in rows if row.number == number)
        facts = {
            "study": study_name,
            "stage": asdict(stage),
            "text": trained.text,
            "token_ids": trained.token_ids,
            "model": trained.model_name,
            "labels": trained.labels,
            "shape": list(trained.embeddings.shape),
        }
        card.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}") from error
    if as_json:
        report.print_json({"stage": number, "files": [str(weights), str(card)]})
    else:
        print(f"Stage {number} exported to {weights} and {card}.")
