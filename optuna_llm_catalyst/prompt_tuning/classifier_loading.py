"""A classifier from a folder, with no study at hand, or from a study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import inspect
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import optuna
import torch

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import classifier_files
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierFacts
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.data.images import write_blank_image
from optuna_llm_catalyst.prompt_tuning.ensemble import load_prompt_ensemble
from optuna_llm_catalyst.prompt_tuning.ensemble import member_trials
from optuna_llm_catalyst.prompt_tuning.models import reads_images
from optuna_llm_catalyst.prompt_tuning.models import TASK_MODELS
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained
from optuna_llm_catalyst.prompt_tuning.product_store import load_product
from optuna_llm_catalyst.prompt_tuning.product_store import product_stages
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


def load_classifier(
    source: str | Path | optuna.Study,
    *,
    device: str = "auto",
    artifact_store: ArtifactStore | None = None,
    model: TaskModel | str | None = None,
    trust_remote_code: bool = False,
) -> PromptClassifier:
    """Loads a classifier with its frozen model.

    Args:
        source: A folder that ``export`` wrote, or a study. Of a study it is the classifier that
            ``tune`` left there, if that is of the study's complete stages; else their uniform
            ensemble without a fit, which is logged. ``PromptTuningObjective.classifier`` fits it.
        device: A torch device, or ``auto``: a GPU if there is one.
        artifact_store: Where a study's artifacts are; by default ``llm_catalyst_artifacts``.
        model: The frozen model where it cannot be had by the name that is written down: another
            folder or name, or a task model. It must be the same model.
        trust_remote_code: Whether to run code that the model's folder brings along.

    Raises:
        CheckpointError: If there is no classifier, it is not whole, or the model is another one.
        ModelNotFoundError: If the frozen model cannot be had.
        ValueError: If the device cannot be used.
    """
    if isinstance(source, optuna.Study):
        name = f"study {source.study_name!r}"
        state = _of_study(source, artifact_store or checkpoints.default_store())
    else:
        name = os.fspath(source)
        state = classifier_files.read(source)
    if model is None or isinstance(model, str):
        model = _task_model(state, name, model, usable_device(device), trust_remote_code)
    facts = state.facts
    classifier = PromptClassifier(
        model,
        state.ensemble,
        is_fitted=facts.is_fitted,
        reads_pairs=facts.reads_pairs,
        table=facts.table,
    )
    _check_shapes(classifier, name)
    return classifier


def usable_device(name: str, *, called: str = "The device") -> str:
    """A device by its name; ``auto`` is a GPU if there is one.

    Args:
        name: Its name.
        called: What an error calls it, such as an option.

    Raises:
        ValueError: If it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Some devices, such as meta, hold no numbers.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{called} {name!r} cannot be used: {first_line(error)}") from error
    return name


def _of_study(study: optuna.Study, store: ArtifactStore) -> ClassifierState:
    complete = tuple(trial.number for trial in member_trials(study))
    if product_stages(study) == complete and (state := load_product(study, store)):
        return state
    _logger.warning(
        f"Study {study.study_name!r} keeps no classifier of its {len(complete)} complete stages: "
        "this is their uniform ensemble, without a fit to the task's examples, which "
        "`objective.classifier(study)` makes."
    )
    found = load_prompt_ensemble(study, artifact_store=store)
    return ClassifierState(found, _facts_of_stage(study, complete[-1], found.fingerprint))


def _facts_of_stage(study: optuna.Study, number: int, fingerprint: str) -> ClassifierFacts:
    """How the model of a stage was set, of what its record says."""
    trial = next(trial for trial in records.all_trials(study) if trial.number == number)
    record = records.load(trial, "stage", StageRecord)
    if record is None:
        raise CheckpointError(f"stage {number} does not say how its model was set.")
    name = fingerprint.partition(":")[0]
    kind = TASK_MODELS.get(name)
    known = inspect.signature(kind).parameters if kind else ()
    return ClassifierFacts(name, {k: v for k, v in record.settings.items() if k in known})


def _task_model(
    state: ClassifierState, name: str, model: str | None, device: str, trust_remote_code: bool
) -> TaskModel:
    """The task model of a classifier, on its frozen model."""
    found, facts = state.ensemble, state.facts
    kind = TASK_MODELS.get(facts.task_model)
    if kind is None:
        raise CheckpointError(
            f"{name}: it is for the task model {facts.task_model!r}, which is none of "
            f"{', '.join(TASK_MODELS)}: give `model`, one of its kind."
        )
    pretrained = load_pretrained(
        model or found.model_name,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=None if model else facts.revision,
        head=kind.head,
    )
    with checkpoints.explained(f"{name}: it does not fit {pretrained.name!r}"):
        task_model: TaskModel = kind(pretrained, found.labels, **facts.settings)  # type: ignore[arg-type]
    return task_model


def _check_shapes(classifier: PromptClassifier, name: str) -> None:
    """Predicts once: tensors of a file may have the shapes of another model."""
    with (
        checkpoints.explained(f"{name}: it does not fit {classifier.model.name!r}"),
        _any_input(classifier) as given,
    ):
        found = classifier.predict_proba([given])
        if found.shape != (1, len(classifier.classes_)) or not (found >= 0).all():
            raise ValueError("its probabilities are none")


@contextmanager
def _any_input(classifier: PromptClassifier) -> Iterator[object]:
    """Something that a classifier reads."""
    if not reads_images(classifier.model):
        yield ("a", "a") if classifier.reads_pairs else "a"
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "blank.png"
        write_blank_image(path)
        yield path
