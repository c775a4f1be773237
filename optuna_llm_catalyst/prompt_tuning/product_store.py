"""The classifier that ``tune`` leaves on its study: an artifact of the study, with a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import tempfile
from typing import TYPE_CHECKING

import optuna
from optuna.artifacts import upload_artifact

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import classifier_files
from optuna_llm_catalyst.prompt_tuning.checkpoints import checksum
from optuna_llm_catalyst.prompt_tuning.checkpoints import download
from optuna_llm_catalyst.prompt_tuning.checkpoints import explained
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.classifier_files import FILE_NAME
from optuna_llm_catalyst.prompt_tuning.ensemble import member_trials
from optuna_llm_catalyst.schema import encode


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

_RECORD = "classifier"


@dataclass(frozen=True)
class ProductRecord:
    """Which artifact a study's classifier is.

    Attributes:
        artifact_id: The artifact.
        sha256: Its checksum.
        stages: The stages that it is made of.
        complete: Those that it could have been made of: a prompt may be on another machine.
    """

    artifact_id: str
    sha256: str
    stages: tuple[int, ...]
    complete: tuple[int, ...]


def save_product(study: optuna.Study, classifier: PromptClassifier, store: ArtifactStore) -> None:
    """Stores a classifier as its study's product, in place of an earlier one.

    For the process that ends a run of stages, never within a trial.

    Raises:
        CheckpointError: If it cannot be stored.
    """
    with (
        explained(f"the classifier of study {study.study_name!r} cannot be stored"),
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / FILE_NAME
        classifier.save(path)
        artifact_id = upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=study
        )
        complete = tuple(trial.number for trial in member_trials(study))
        stages = classifier.ensemble.numbers
        record = ProductRecord(artifact_id, checksum(path), stages, complete)
    records.save_to_study(study, _RECORD, encode(record))


def product_stages(study: optuna.Study) -> tuple[int, ...]:
    """The stages that were complete when a study's product was made; empty if it has none."""
    record = records.load_from_study(study, _RECORD, ProductRecord)
    return () if record is None else record.complete


def load_product(study: optuna.Study, store: ArtifactStore) -> ClassifierState | None:
    """The product of a study, without its frozen model; None if it has none.

    Raises:
        CheckpointError: If the store has not the one that was stored.
    """
    record = records.load_from_study(study, _RECORD, ProductRecord)
    if record is None:
        return None
    name = f"the classifier of study {study.study_name!r} (artifact {record.artifact_id})"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        download(record.artifact_id, store, path, name=name)
        state = classifier_files.read(path, name=name)
        if checksum(path) != record.sha256 or state.ensemble.numbers != record.stages:
            raise CheckpointError(f"{name} is not the one that was stored.")
    return state
