"""``tune``'s frozen model, with the task on top that the options say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optuna_llm_catalyst import prompt_tuning
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import studies
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning.classifier_loading import usable_device
from optuna_llm_catalyst.prompt_tuning.finding import find_pretrained
from optuna_llm_catalyst.prompt_tuning.finding import Found
from optuna_llm_catalyst.prompt_tuning.finding import model_type_of
from optuna_llm_catalyst.prompt_tuning.finding import ModelType
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.models.templates import own_words


_CLASSES: dict[
    ModelType,
    type[prompt_tuning.DualEncoderClassifier]
    | type[prompt_tuning.SequenceClassifier]
    | type[prompt_tuning.MaskedLMClassifier]
    | type[prompt_tuning.CausalLMClassifier]
    | type[prompt_tuning.CLIPClassifier],
] = {
    "dual-encoder": prompt_tuning.DualEncoderClassifier,
    "sequence-classifier": prompt_tuning.SequenceClassifier,
    "masked-lm": prompt_tuning.MaskedLMClassifier,
    "causal-lm": prompt_tuning.CausalLMClassifier,
    "clip": prompt_tuning.CLIPClassifier,
}
#: Options that belong to some types of models.
_OWNERS: dict[str, tuple[ModelType, ...]] = {
    "prompt_position": ("sequence-classifier",),
    "template": ("masked-lm", "causal-lm"),
    "verbalizer": ("masked-lm", "causal-lm"),
}


def with_model_type(options: TuneOptions) -> tuple[TuneOptions, Found]:
    """The options with a type of model, and where the model was found.

    Where no type is given, it is the one that the study was made with, or that the model's folder
    says; the screen tells it.
    """
    found = find_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    if options.model_type is None:
        kind = studies.made_with(options.storage, options.study_name, "--model-type")
        why = "the study was made with it"
        if kind not in _CLASSES:
            kind, why = model_type_of(found.folder)
            why += "; --model-type takes another"
        output.say(f"Model type {kind}: {why}.")
        options = replace(options, model_type=kind)
    for name, owners in _OWNERS.items():
        if getattr(options, name) and options.model_type not in owners:
            raise output.UserError(
                f"--{name.replace('_', '-')} needs --model-type {' or '.join(owners)}, this is "
                f"--model-type {options.model_type}."
            )
    return options, found


def make(
    options: TuneOptions, task: prompt_tuning.Task, found: Found
) -> tuple[TaskModel, prompt_tuning.Pretrained]:
    """The task model, and the pretrained one below it; says where that was found."""
    kind = options.model_type or "dual-encoder"
    if task.of_images and kind != "clip":
        raise output.UserError(
            f"{options.data} is of images: add --model-type clip and --model, a CLIP or SigLIP "
            "model such as google/siglip2-base-patch16-224."
        )
    settings = _settings(options, kind, task)
    pretrained = prompt_tuning.load_pretrained(
        found,
        device=usable_device(options.device, called="--device"),
        trust_remote_code=options.trust_remote_code,
        head=_CLASSES[kind].head,
    )
    output.say(f"Model {pretrained.name} from {pretrained.source}.")
    return _CLASSES[kind](pretrained, task.labels, **settings), pretrained


def _settings(options: TuneOptions, kind: ModelType, task: prompt_tuning.Task) -> dict[str, Any]:
    """What the options say of a task model of a type."""
    if kind in ("dual-encoder", "clip"):
        return {}
    length = {"max_virtual_tokens": options.num_virtual_tokens}
    if kind == "sequence-classifier":
        return {**length, "prompt_position": options.prompt_position or "behind_cls"}
    template = {"template": options.template} if options.template else {}
    return {**length, **template, "verbalizers": _verbalizers(options, task)}


def _verbalizers(options: TuneOptions, task: prompt_tuning.Task) -> dict[str, list[str]] | None:
    """The words of each label; a label that is not given has its name."""
    given = own_words(task.labels)
    for value in options.verbalizer:
        label, has_words, listed = value.partition("=")
        words = [word.strip() for word in listed.split(",") if word.strip()]
        if not has_words or not words or label not in given:
            raise output.UserError(
                f"--verbalizer {value!r} is not LABEL=WORD,WORD with a label of "
                f"{', '.join(task.labels)}."
            )
        given[label] = words
    return given if options.verbalizer else None
