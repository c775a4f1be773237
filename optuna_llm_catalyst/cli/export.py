"""``export``: a trained soft prompt, or the LLM's replies, out of the study for use elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
import json
from pathlib import Path
from typing import Any

import optuna

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.studies import load_study


def export(
    output: Path | None,
    replies: Path | None,
    storage: str,
    study_name: str,
    *,
    trial_number: int | None,
    artifacts: Path,
    as_json: bool,
) -> None:
    """Writes ``soft_prompt.safetensors`` and ``prompt.json``, or recorded replies, or both."""
    if output is None and replies is None:
        raise UserError("say what to export: a folder for the soft prompt, or --replies FILE.")
    study = load_study(storage, study_name)
    document: dict[str, Any] = {}
    if replies is not None:
        rows = list(reply_rows(study))
        _write(replies, "".join(json.dumps(row) + "\n" for row in rows))
        document |= {"replies": str(replies), "n_replies": len(rows)}
    if output is not None:
        number, files = _export_soft_prompt(study, output, trial_number, artifacts)
        document |= {"stage": number, "files": [str(path) for path in files]}
    if as_json:
        report.print_json(document)
        return
    if replies is not None:
        print(f"{document['n_replies']} replies exported to {replies}.")
    if output is not None:
        print(f"Stage {document['stage']} exported to {' and '.join(document['files'])}.")


def reply_rows(study: optuna.Study) -> Iterator[dict[str, Any]]:
    """What the LLM answered or why it did not, a row for each time that a trial asked."""
    # A trial that Optuna runs again after a crash carries the record of the first.
    for trial in filter(records.has_own_proposal, records.all_trials(study)):
        asks = (records.load(trial, "proposal", dict[str, Any]) or {}).get("attempts", ())
        for attempt, ask in enumerate(asks):
            row = {"trial": trial.number, "attempt": attempt}
            if "error" in ask:
                yield row | {"error": ask["error"]}
                continue
            row |= {"reply": ask["reply"], "model": ask["model"]}
            if ask.get("server_problem"):
                row["problem"] = ask["server_problem"]
            yield row


def _export_soft_prompt(
    study: optuna.Study, output: Path, trial_number: int | None, artifacts: Path
) -> tuple[int, tuple[Path, Path]]:
    from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
    from optuna_llm_catalyst.prompt_tuning.checkpoints import load_soft_prompt
    from optuna_llm_catalyst.prompt_tuning.checkpoints import write

    rows = report.stage_rows(study)
    best = report.chosen(rows)
    if trial_number is None:
        if best is None:
            raise UserError(f"study {study.study_name!r} has no complete stage to export yet.")
        trial_number = best.number
    if not artifacts.is_dir():
        raise UserError(f"--artifacts {str(artifacts)!r}: no such folder.")
    trained = load_soft_prompt(
        study, trial_number=trial_number, artifact_store=folder_store(artifacts)
    )
    weights, card = output / "soft_prompt.safetensors", output / "prompt.json"
    facts = {
        "study": study.study_name,
        "stage": asdict(next(row for row in rows if row.number == trial_number)),
        "text": trained.facts.text,
        "token_ids": trained.facts.token_ids,
        "model": trained.facts.model_name,
        "labels": trained.facts.labels,
        "kind": trained.prompt.kind.name,
        "shape": list(trained.prompt.words()[0].shape),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        write(trained, weights)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}") from error
    _write(card, json.dumps(facts, indent=2) + "\n")
    return trial_number, (weights, card)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
