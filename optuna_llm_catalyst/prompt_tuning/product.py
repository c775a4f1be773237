"""What a study is for: its fitted ensemble, beside what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState
import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import baselines
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import ensemble
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.stage_plan import placed


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning.objective import PromptTuningObjective

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

FIRST = "first stage"
CHOSEN = "chosen stage"
ENSEMBLE = "ensemble"
FITTED = "fitted ensemble"


@dataclass(frozen=True, eq=False)
class Product:
    """An ensemble and its test log-probabilities beside those of other ways.

    Attributes:
        classifier: The ensemble, fitted where the model allows it.
        name: What it is called among the rows.
        log_probs: Log-probabilities ``(n, C)`` of the test split by the name of a row; empty
            without test examples.
    """

    classifier: PromptClassifier
    name: str
    log_probs: dict[str, Tensor]


def measure(objective: PromptTuningObjective, study: optuna.Study) -> Product:
    """The product of a study and of what it is compared with, on the test split.

    The rows are, where the model has them: the class names alone, a linear probe, a probe pulled
    towards the class names, the first stage, the stage chosen by the study's value, the ensemble
    of all complete stages, and this ensemble fitted. A stage that cannot be loaded has no row.

    Raises:
        CheckpointError: If no stage is complete, or none has a prompt that can be loaded.
    """
    classifier = objective.classifier(study)
    name = FITTED if classifier.is_fitted else ENSEMBLE
    rows = {}
    if objective.task.test:
        rows = {**_baselines(objective), **_stages(objective, study)}
        rows[ENSEMBLE] = _together(objective, objective.classifier(study, fit=False))
        rows[name] = _together(objective, classifier)
    return Product(classifier, name, rows)


def _baselines(objective: PromptTuningObjective) -> dict[str, Tensor]:
    model, data = objective.model, objective.data
    found = baselines.readouts(model, data, objective.space.vocabulary.encode)
    if not isinstance(model, baselines.HasTextFeatures):
        return {}
    features = model.text_features(data.split("test"))
    return {name: readout.log_probs(features) for name, readout in found.items()}


def _stages(objective: PromptTuningObjective, study: optuna.Study) -> dict[str, Tensor]:
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    chosen, found = checkpoints.best_trial(study).number, {}
    for name, number in {FIRST: complete[0].number, CHOSEN: chosen}.items():
        try:
            trained = placed(objective.prompts.load(study, number), objective.model)
        except CheckpointError as error:
            _logger.warning(f"There is no row of the {name}: {error}")
            continue
        prompt, split = objective.data.read(trained, "test")
        with torch.inference_mode():
            found[name] = objective.model.log_probs(prompt, split)[0]
    return found


def _together(objective: PromptTuningObjective, classifier: PromptClassifier) -> Tensor:
    groups = classifier.ensemble.groups
    return ensemble.log_probs(
        objective.model, groups, lambda text: objective.data.split("test", text)
    )
