"""What a study is for: its fitted ensemble, beside what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning import baselines
from optuna_llm_catalyst.prompt_tuning import ensemble
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import SplitName
from optuna_llm_catalyst.prompt_tuning.ensemble import Group
from optuna_llm_catalyst.prompt_tuning.fitted import fit_groups
from optuna_llm_catalyst.prompt_tuning.models import TaskModel


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning.objective import PromptTuningObjective

FIRST = "first stage"
CHOSEN = "chosen stage"
ENSEMBLE = "ensemble"
FITTED = "fitted ensemble"


@dataclass(frozen=True, eq=False)
class Product:
    """An ensemble and its test log-probabilities beside those of other ways.

    Attributes:
        groups: The ensemble, fitted where the model allows it.
        name: What it is called among the rows.
        log_probs: Log-probabilities ``(n, C)`` of the test split by the name of a row; empty
            without test examples.
    """

    groups: tuple[Group, ...]
    name: str
    log_probs: dict[str, Tensor]


def measure(
    objective: PromptTuningObjective, study: optuna.Study, *, split: SplitName = "test"
) -> Product:
    """The product of a study and of what it is compared with, on one split.

    The rows are, where the model has them: the class names alone, a linear probe, a probe pulled
    towards the class names, the first stage, the stage chosen by the study's value, the ensemble
    of all complete stages, and this ensemble fitted.

    Raises:
        CheckpointError: If no stage is complete.
    """
    model, data = objective.model, objective.data
    members = objective.ensemble.members(study)
    averaged = ensemble.averaged(ensemble.grouped(members), model)
    fitted = fit_groups(averaged, data)
    has_fit = any(group.readout is not None for group in averaged)
    product = Product(fitted, FITTED if has_fit else ENSEMBLE, {})
    if not getattr(objective.task, split):
        return product
    encode = objective.space.vocabulary.encode
    found = {
        name: readout.log_probs(_features(model, data, split))
        for name, readout in baselines.readouts(model, data, encode).items()
    }
    numbers = {FIRST: ensemble.member_trials(study)[0].number, CHOSEN: study.best_trial.number}
    for name, number in numbers.items():
        prompt, texts = data.read(objective.placed(objective.prompts.load(study, number)), split)
        with torch.inference_mode():
            found[name] = model.log_probs(prompt, texts)[0]
    found[ENSEMBLE] = _together(model, averaged, data, split)
    if has_fit:
        found[FITTED] = _together(model, fitted, data, split)
    product.log_probs.update(found)
    return product


def _features(model: TaskModel, data: EncodedTask, split: SplitName) -> Tensor:
    assert isinstance(model, baselines.HasTextFeatures)
    return model.text_features(data.split(split))


def _together(
    model: TaskModel, groups: tuple[Group, ...], data: EncodedTask, split: SplitName
) -> Tensor:
    return ensemble.log_probs(model, groups, lambda text: data.split(split, text))
