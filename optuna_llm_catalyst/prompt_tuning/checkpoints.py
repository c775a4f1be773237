"""Trained prompts as artifacts of their trials, in safetensors.

A file holds the prompt's tensors by name and, as metadata, the kind of prompt and the facts of
:class:`TrainedPrompt`. A trial's record holds the file's checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
import hashlib
from io import BytesIO
import json
import math
from pathlib import Path
import tempfile
from typing import TYPE_CHECKING
import uuid

import optuna
from optuna.artifacts import download_artifact
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts import upload_artifact
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning.prompts import kind_of
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.schema import decode


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore


#: Where artifacts are kept unless a store is given.
DEFAULT_FOLDER = Path("llm_catalyst_artifacts")
_FILE_NAME = "soft_prompt.safetensors"
_FORMAT = "2"
_METADATA = "llm_catalyst"
_ATTRIBUTE = "soft_prompt_artifact"


@dataclass(frozen=True)
class PromptFacts:
    """The words that a prompt was trained from, the labels in order, and the frozen model."""

    text: str
    token_ids: tuple[int, ...]
    labels: tuple[str, ...]
    model_name: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class TrainedPrompt:
    """A prompt as a stage left it.

    Attributes:
        prompt: The prompt and its head in float32, with ``P = 1``.
        facts: What it was trained from and for.
    """

    prompt: Prompt
    facts: PromptFacts


@dataclass(frozen=True)
class _Metadata:
    format: str
    kind: str
    facts: PromptFacts


def folder_store(folder: str | Path) -> FileSystemArtifactStore:
    """A store in a folder, made if need be; a CheckpointError if that cannot be."""
    with explained(f"{folder}: no folder for artifacts"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(base_path=str(folder))


def check_writable(store: ArtifactStore) -> None:
    """Raises a CheckpointError unless a store and the temporary folder can be written."""
    probe = f"probe-{uuid.uuid4()}"
    with explained("trained prompts cannot be stored, so no stage was started"):
        with tempfile.TemporaryFile() as file:
            file.write(probe.encode())
        store.write(probe, BytesIO(probe.encode()))
        store.remove(probe)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The best trial of a study, of equal ones that of the lowest validation loss.

    Raises a CheckpointError if no trial is complete yet.
    """
    try:
        best = study.best_trial
    except ValueError as error:
        raise CheckpointError(f"study {study.study_name!r} has no complete stage yet.") from error
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    equal = [trial for trial in complete if trial.value == best.value]
    return min(equal, key=lambda trial: (_loss(trial), trial.number))


def _loss(trial: FrozenTrial) -> float:
    found = trial.user_attrs.get("loss")
    return float(found) if isinstance(found, int | float) else math.inf


def write(trained: TrainedPrompt, path: str | Path) -> None:
    """Writes a trained prompt to a safetensors file.

    Raises:
        CheckpointError: If it cannot be written.
    """
    metadata = _Metadata(_FORMAT, trained.prompt.kind.name, trained.facts)
    cpu = trained.prompt.map(lambda tensor: tensor.detach().cpu().contiguous().clone())
    text = json.dumps(asdict(metadata), sort_keys=True)
    with explained(f"{path}: cannot be written"):
        save_file(dict(cpu.tensors), str(path), metadata={_METADATA: text})


def read(path: str | Path, *, name: str = "") -> TrainedPrompt:
    """Reads a trained prompt from a safetensors file.

    Raises a CheckpointError, which names it by ``name`` or else by its path, if the file is not
    there, was not written by this package, or is incomplete.
    """
    name = name or str(path)
    texts, tensors = read_tensors(path, f"{name}: not a safetensors file")
    with explained(f"{name}: no soft prompt of this package (format {_FORMAT})"):
        metadata = decode(_Metadata, json.loads(texts[_METADATA]))
        if metadata.format != _FORMAT:
            raise ValueError(f"it has format {metadata.format!r}")
        prompt = Prompt(kind_of(metadata.kind, tensors), tensors)
        shape, length = tuple(prompt.words().shape), len(metadata.facts.token_ids)
        if len(shape) != 3 or shape[:2] != (1, length):
            raise ValueError(f"its prompt has the shape {shape}, expected (1, {length}, d)")
        if not prompt.is_finite():
            raise ValueError("it holds numbers that are not finite")
    return TrainedPrompt(prompt, metadata.facts)


def read_tensors(path: str | Path, problem: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file.

    Raises:
        CheckpointError: Which begins with the problem, if it cannot be read.
    """
    with explained(problem), safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, tensors


def save(trial: BaseTrial, trained: TrainedPrompt, store: ArtifactStore) -> None:
    """Uploads a trained prompt as an artifact of a running trial.

    Its id becomes the user attribute ``soft_prompt_artifact``, after the upload; if they
    cannot be stored, a CheckpointError says so. Trials that live in no storage (``FixedTrial``)
    have no artifacts.
    """
    if not isinstance(trial, Trial):
        return
    with (
        explained(f"the soft prompt of trial {trial.number} cannot be stored"),
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / _FILE_NAME
        write(trained, path)
        artifact_id = upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=trial
        )
        record = _record(artifact_id, path)
    records.save(trial, "soft_prompt", record)
    trial.set_user_attr(_ATTRIBUTE, artifact_id)


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
        CheckpointError: If the trial has no soft prompt, or the store holds none or another.
    """
    number = best_trial(study).number if trial_number is None else trial_number
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    if number not in trials:
        raise CheckpointError(f"study {study.study_name!r} has no trial {number}.")
    return load_of(trials[number], artifact_store or default_store())


def default_store() -> FileSystemArtifactStore:
    """Where a study's artifacts are unless a store is given."""
    return FileSystemArtifactStore(base_path=str(DEFAULT_FOLDER))


def load_of(trial: FrozenTrial, store: ArtifactStore) -> TrainedPrompt:
    """Loads the trained prompt of a trial.

    Raises:
        CheckpointError: If the trial has none, or the store holds none or another.
    """
    artifact_id = trial.user_attrs.get(_ATTRIBUTE)
    if not isinstance(artifact_id, str):
        raise CheckpointError(f"trial {trial.number} has no soft prompt artifact.")
    name = f"the soft prompt of trial {trial.number} (artifact {artifact_id})"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE_NAME
        download(artifact_id, store, path, name=name)
        trained = read(path, name=name)
        record = _record(artifact_id, path)
    if records.load(trial, "soft_prompt", dict[str, str]) != record:
        raise CheckpointError(
            f"{name} is not the one that the trial stored: its id or its checksum is another, or "
            "the trial does not say."
        )
    return trained


def _record(artifact_id: str, path: Path) -> dict[str, str]:
    return {"artifact_id": artifact_id, "sha256": checksum(path)}


def download(artifact_id: str, store: ArtifactStore, path: Path, *, name: str) -> None:
    """Downloads an artifact to a file; a CheckpointError, which names it, if it is not there."""
    with explained(
        f"{name} is not in this artifact store: give the store, or the folder, with which the "
        "study was made"
    ):
        download_artifact(artifact_store=store, file_path=str(path), artifact_id=artifact_id)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Whatever a store or a file raises, as one kind of error that says what it is about."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{problem}: {type(error).__name__}: {first_line(error)}") from error
