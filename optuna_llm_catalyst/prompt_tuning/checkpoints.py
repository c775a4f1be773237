"""Trained soft prompts as artifacts of their trials, in safetensors."""

from __future__ import annotations

from dataclasses import dataclass
import json
from pathlib import Path
import tempfile
from typing import Any
from typing import TYPE_CHECKING

from optuna.artifacts import download_artifact
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts import upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import Trial
from safetensors import safe_open
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning.models import Head


if TYPE_CHECKING:
    import optuna
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

#: Where artifacts are kept unless a store is given.
DEFAULT_FOLDER = Path("llm_catalyst_artifacts")
_FILE_NAME = "soft_prompt.safetensors"
_FORMAT = "1"
_PROMPT = "prompt"
_HEAD_PREFIX = "head."


@dataclass(frozen=True)
class TrainedPrompt:
    """A soft prompt as a stage left it.

    Attributes:
        embeddings: The virtual tokens in float32, of shape ``(L, d)``.
        head: The head that was trained with them; empty if the model has none.
        text: The restart prompt it was trained from.
        token_ids: Its token ids.
        model_name: The frozen model.
        labels: The label names, in the order of the logits.
    """

    embeddings: Tensor
    head: Head
    text: str
    token_ids: tuple[int, ...]
    model_name: str
    labels: tuple[str, ...]


def folder_store(folder: str | Path) -> FileSystemArtifactStore:
    """A store in a folder, made if need be.

    Raises:
        CheckpointError: If the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: no folder for artifacts: {error}") from error
    return FileSystemArtifactStore(base_path=str(folder))


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The best trial of a study.

    Raises:
        CheckpointError: If no trial is complete yet.
    """
    try:
        return study.best_trial
    except ValueError as error:
        raise CheckpointError(f"study {study.study_name!r} has no complete stage yet.") from error


def write(trained: TrainedPrompt, path: str | Path) -> None:
    """Writes a trained prompt to a safetensors file."""
    tensors = {_PROMPT: trained.embeddings}
    tensors |= {_HEAD_PREFIX + name: rows for name, rows in trained.head.items()}
    facts = {
        "format": _FORMAT,
        "text": trained.text,
        "token_ids": trained.token_ids,
        "model_name": trained.model_name,
        "labels": trained.labels,
    }
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(cpu, str(path), metadata={"llm_catalyst": json.dumps(facts)})


def read(path: str | Path) -> TrainedPrompt:
    """Reads a trained prompt from a safetensors file.

    Raises:
        CheckpointError: If the file is not there or is none of ours.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    head = {
        name.removeprefix(_HEAD_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_HEAD_PREFIX)
    }
    not_ours = f"{path}: no soft prompt of this package (format {_FORMAT})."
    try:
        facts: dict[str, Any] = json.loads(metadata["llm_catalyst"])
        trained = TrainedPrompt(
            embeddings=tensors[_PROMPT],
            head=head,
            text=facts["text"],
            token_ids=tuple(facts["token_ids"]),
            model_name=facts["model_name"],
            labels=tuple(facts["labels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(not_ours) from error
    if facts.get("format") != _FORMAT:
        raise CheckpointError(not_ours)
    return trained


def save(trial: BaseTrial, trained: TrainedPrompt, store: ArtifactStore) -> None:
    """Uploads a trained prompt as an artifact of a running trial.

    Its id becomes the user attribute ``soft_prompt_artifact``, once the bytes are safe. Trials
    that live in no storage (``FixedTrial``) have no artifacts.
    """
    if not isinstance(trial, Trial):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE_NAME
        write(trained, path)
        artifact_id = upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=trial
        )
    trial.set_user_attr("soft_prompt_artifact", artifact_id)


def load_soft_prompt(
    study: optuna.Study,
    *,
    trial_number: int | None = None,
    artifact_store: ArtifactStore | None = None,
) -> TrainedPrompt:
    """Loads the soft prompt of a study's best stage, or of a given one.

    Args:
        study: The study.
        trial_number: The stage; by default the one with the best value.
        artifact_store: Where the study's artifacts are; by default ``llm_catalyst_artifacts``.

    Raises:
        CheckpointError: If the trial has no soft prompt, or the store does not hold it.
    """
    if trial_number is None:
        trial = best_trial(study)
    else:
        found = [t for t in study.get_trials(deepcopy=False) if t.number == trial_number]
        if not found:
            raise CheckpointError(f"study {study.study_name!r} has no trial {trial_number}.")
        trial = found[0]
    artifact_id = trial.user_attrs.get("soft_prompt_artifact")
    if artifact_id is None:
        raise CheckpointError(f"trial {trial.number} has no soft prompt artifact.")
    store = artifact_store
    if store is None:
        store = FileSystemArtifactStore(base_path=str(DEFAULT_FOLDER))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE_NAME
        try:
            download_artifact(artifact_store=store, file_path=str(path), artifact_id=artifact_id)
        except (ArtifactNotFound, FileNotFoundError) as error:
            raise CheckpointError(
                f"the soft prompt of trial {trial.number} is not in this artifact store: give "
                "the store, or the folder, with which the study was made."
            ) from error
        return read(path)
