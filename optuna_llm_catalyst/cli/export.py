"""``export``: the classifier, a soft prompt, or the LLM's replies, for use elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
import json
import os
from pathlib import Path
import shlex
from typing import Any
from typing import Literal

import optuna
from optuna.artifacts import FileSystemArtifactStore
from safetensors import SafetensorError

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.options import ExportOptions
from optuna_llm_catalyst.cli.show import ProposalRecord
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.file_writing import write_whole
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import write_peft
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import encode
from optuna_llm_catalyst.schema import SchemaError


@dataclass(frozen=True)
class _Reading:
    """How a sequence classifier reads, of the settings of a stage."""

    max_length: int
    max_virtual_tokens: int
    prompt_position: Literal["behind_cls", "front"]


def run(options: ExportOptions) -> None:
    """Writes what is asked for: the classifier or one stage, a stage for PEFT, replies."""
    if options.output is None and options.replies is None and options.peft is None:
        raise output.UserError(
            "say what to export: a folder for the classifier, --peft FOLDER, or --replies FILE."
        )
    study = load_study(options.storage, options.study_name)
    document: dict[str, Any] = {}
    lines = []
    if options.replies is not None:
        n_replies = _export_replies(study, options.replies)
        document |= {"replies": str(options.replies), "n_replies": n_replies}
        lines.append(f"{n_replies} replies exported to {options.replies}.")
    if options.output is not None and options.trial is None:
        classifier, files = _export_classifier(study, options.output, options)
        document |= {
            "stages": classifier.ensemble.numbers,
            "is_fitted": classifier.is_fitted,
            "files": files,
        }
        lines += _classifier_lines(classifier, files)
    elif options.output is not None:
        number, files = _export_soft_prompt(study, options.output, options)
        document |= {"stage": number, "files": files}
        lines.append(f"Stage {number} exported to {' and '.join(files)}.")
    if options.peft is not None:
        number, files = _export_peft(study, options.peft, options)
        document |= {"stage": number, "peft": files}
        lines.append(f"Stage {number} exported for PEFT to {' and '.join(files)}.")
    output.report(document, lines, as_json=options.json)


def reply_rows(study: optuna.Study) -> Iterator[dict[str, Any]]:
    """What the LLM replied or why it did not, a row for each attempt of each trial."""
    # A trial that Optuna runs again after a crash carries the record of the first.
    for trial in filter(records.has_own_proposal, records.all_trials(study)):
        proposal = records.load(trial, "proposal", ProposalRecord)
        for number, attempt in enumerate(proposal.attempts if proposal else ()):
            row: dict[str, Any] = {"trial": trial.number, "attempt": number}
            if attempt.error is not None:
                row["error"] = attempt.error
            else:
                row |= {"reply": attempt.reply, "model": attempt.model or ""}
            if attempt.server_problem:
                row["problem"] = attempt.server_problem
            yield row


def _export_replies(study: optuna.Study, path: Path) -> int:
    rows = list(reply_rows(study))
    if not rows:
        kept = f"; {path} is left as it is" if path.exists() else ""
        raise output.UserError(f"study {study.study_name!r} has no replies to export{kept}.")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _replace(path, lambda new: new.write_text(text, encoding="utf-8"))
    return len(rows)


def _export_classifier(
    study: optuna.Study, folder: Path, options: ExportOptions
) -> tuple[PromptClassifier, list[str]]:
    classifier = load_classifier(
        study,
        device=options.device,
        artifact_store=_store(options),
        model=options.model or None,
        trust_remote_code=options.trust_remote_code,
    )
    return classifier, [str(path) for path in classifier.export(folder)]


def _classifier_lines(classifier: PromptClassifier, files: list[str]) -> Iterator[str]:
    n_stages = len(classifier.ensemble.numbers)
    fit = "fitted" if classifier.is_fitted else "uniform, without a fit"
    yield f"Classifier of {n_stages} stages ({fit}) exported to {', '.join(files)}."
    folder = shlex.quote(os.path.dirname(files[0]))
    yield f"Next: optuna-llm-catalyst predict {folder} --text 'A text.'"


def _export_soft_prompt(
    study: optuna.Study, folder: Path, options: ExportOptions
) -> tuple[int, list[str]]:
    row, trained = _trained(study, options)
    facts = {
        "study": study.study_name,
        "stage": row,
        "text": trained.facts.text,
        "token_ids": trained.facts.token_ids,
        "model": trained.facts.model_name,
        "fingerprint": trained.facts.fingerprint,
        "labels": trained.facts.labels,
        "kind": trained.prompt.kind.name,
        "shape": list(trained.prompt.words()[0].shape),
    }
    weights, card = folder / "soft_prompt.safetensors", folder / "prompt.json"
    _replace(weights, lambda new: checkpoints.write(trained, new))
    text = json.dumps(encode(facts), indent=2, allow_nan=False) + "\n"
    _replace(card, lambda new: new.write_text(text, encoding="utf-8"))
    return row.number, [str(weights), str(card)]


def _export_peft(
    study: optuna.Study, folder: Path, options: ExportOptions
) -> tuple[int, list[str]]:
    row, trained = _trained(study, options)
    try:
        reading = decode(_Reading, row.settings)
    except SchemaError as error:  # Another model's stage has other settings.
        raise output.UserError(
            f"stage {row.number} has no prompt that PEFT could put before a text: tune with "
            "--model-type sequence-classifier --prompt-position front."
        ) from error
    pretrained = load_pretrained(
        options.model or trained.facts.model_name, trust_remote_code=options.trust_remote_code
    )
    model = SequenceClassifier(pretrained, trained.facts.labels, **vars(reading))
    return row.number, [str(path) for path in write_peft(trained, model, folder)]


def _trained(
    study: optuna.Study, options: ExportOptions
) -> tuple[report.StageRow, checkpoints.TrainedPrompt]:
    """The chosen stage and its trained prompt."""
    row, store = report.stage_row(study, options.trial), _store(options)
    return row, checkpoints.load_soft_prompt(study, trial_number=row.number, artifact_store=store)


def _store(options: ExportOptions) -> FileSystemArtifactStore:
    if not options.artifacts.is_dir():
        raise output.UserError(f"--artifacts {str(options.artifacts)!r}: no such folder.")
    return checkpoints.folder_store(options.artifacts)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside the old one, which it replaces once it is whole."""
    try:
        write_whole(path, write)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise output.UserError(f"{path.resolve()} cannot be written: {said}.") from error
