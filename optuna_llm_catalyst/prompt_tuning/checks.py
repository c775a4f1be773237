"""What must fit together: a model, a task, a space of prompts, and the study of a trial."""

from __future__ import annotations

from collections import Counter

import optuna

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import HasHead
from optuna_llm_catalyst.prompt_tuning.models import reads_images
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning.stages import needs_gradient
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.text_prompts import LaterTexts


def check_parts(model: TaskModel, task: Task, space: PromptSpace, n_text_prompts: int) -> None:
    """Raises if model, task and space do not belong together."""
    if task.of_images and not reads_images(model):
        raise ValueError(
            f"`task` is of images, which {type(model).__name__} does not read: take "
            "CLIPClassifier (--model-type clip)."
        )
    if not task.validation:
        raise ValueError(
            "`task` has no validation examples, by which stages are compared: add "
            "validation.jsonl, or draw them with `few_shot(task, shots, seed)`."
        )
    if tuple(task.labels) != tuple(model.labels):
        raise ValueError(f"`model` has the labels {model.labels}, `task` has {task.labels}.")
    if space.vocab_size > model.vocab_size:
        raise ValueError(
            f"`space` has {space.vocab_size} tokens, `model` embeds {model.vocab_size}: make the "
            "space with the model's tokenizer."
        )
    if space.num_virtual_tokens > model.placement.max_virtual_tokens:
        raise ValueError(
            f"`space` has {space.num_virtual_tokens} virtual tokens, `model` has room for "
            f"{model.placement.max_virtual_tokens}."
        )
    check_at_least(0, n_text_prompts=n_text_prompts)
    if n_text_prompts and len(model.placement.sides) < 2:
        raise ValueError(
            f"`n_text_prompts` is {n_text_prompts}, but {type(model).__name__} takes prompts "
            f"before its {model.placement.sides[0]} only: leave it at 0."
        )
    room = min(model.placement.room.values(), default=space.num_virtual_tokens)
    if n_text_prompts and space.num_virtual_tokens > room:
        raise ValueError(
            f"`space` has {space.num_virtual_tokens} virtual tokens, `model` keeps room for "
            f"{room} before a text: raise its `max_virtual_tokens`, or take `n_text_prompts=0`."
        )


def check_shared(model: TaskModel, share_examples: bool) -> None:
    """Raises a ValueError if examples are to be shared that are no texts."""
    if share_examples and reads_images(model):
        raise ValueError(
            "`share_examples` (--share-examples) shows texts of the task to the LLM; these "
            "examples are images, of which it would see the paths: leave it out."
        )


def check_kind(model: TaskModel, kind: PromptKind) -> None:
    """Raises a ValueError if a model cannot take a kind of prompt."""
    kind.start(model.embed([[0]]), model.placement)


def check_later_kind(kind: PromptKind, n_text_prompts: int, later_texts: LaterTexts) -> None:
    """Raises a ValueError if later stages would train a text prompt under another."""
    if n_text_prompts and later_texts != "plain" and kind.name == on_both_sides(kind).name:
        raise ValueError(
            f"`prompt_kind` {kind.name} trains a prompt before texts in every stage, which cannot "
            f"stand before texts under a kept prompt (`later_texts` is {later_texts!r}): take "
            "`n_text_prompts=0`, or the kind of one side."
        )


def check_stage(model: TaskModel, stage: Stage, kind: PromptKind, task: Task) -> None:
    """Raises a ValueError if a stage cannot train a kind of prompt on a model and a task."""
    if kind.needs_gradient and not needs_gradient(stage):
        raise ValueError(
            f"{type(stage).__name__} searches around embeddings without gradients, and the "
            f"weights of a {kind.name} prompt are none: take GradientStage, or SoftPrompt."
        )
    if needs_gradient(stage) and not model.is_differentiable:
        raise ValueError(
            f"{type(stage).__name__} needs gradients, and {type(model).__name__} has none to "
            "give: take BlackBoxStage or ZerothOrderStage."
        )
    if not isinstance(stage, ContrastiveStage):
        return
    if not isinstance(model, HasHead):
        raise ValueError(
            f"ContrastiveStage needs a model with a linear head, such as SequenceClassifier; "
            f"{type(model).__name__} has none."
        )
    if max(Counter(example.label for example in task.train).values()) < 2:
        raise ValueError(
            "ContrastiveStage draws texts of one label together, and no label has two training "
            "examples: take more, or GradientStage."
        )


def check_study(
    study: optuna.Study, number: int, model: TaskModel, metric: Metric, kind: PromptKind
) -> None:
    """Checks that a study can take the value of the trial of a number.

    Raises:
        ValueError: If the study has the other direction.
        StudyMismatchError: If the last other stage ran on another model, or its value is of
            another metric: values do not compare.
    """
    directions = [direction.name.lower() for direction in study.directions]
    if directions != [metric.direction]:
        raise ValueError(
            f"The objective {metric.direction}s one value, its {metric.name} on the validation "
            f"split, but the study is to {' and '.join(directions)}: create it with "
            f"direction={metric.direction!r}, which is `objective.direction`."
        )
    others = (trial for trial in records.all_trials(study)[::-1] if trial.number != number)
    found = ((trial.number, records.load(trial, "stage", StageRecord)) for trial in others)
    for other, record in found:
        if record is None:
            continue
        if record.model.fingerprint != model.fingerprint:
            raise StudyMismatchError(
                f"Trial {other} ran on the model {record.model.name!r} (fingerprint "
                f"{record.model.fingerprint}), this one would run on {model.name!r} "
                f"({model.fingerprint}). Use the model of the study, or a new study name."
            )
        if record.metric != metric.name:
            raise StudyMismatchError(
                f"Trial {other} was valued by {record.metric}, this one would be by "
                f"{metric.name}. Use the metric of the study, or a new study name."
            )
        if record.prompt_kind != kind.name:
            raise StudyMismatchError(
                f"Trial {other} has prompts of the kind {record.prompt_kind}, this one would have "
                f"{kind.name} ones. Use the kind of the study, or a new study name."
            )
        return
