"""``tune``'s frozen model, with the task on top that the options say."""

from __future__ import annotations

from optuna_llm_catalyst import prompt_tuning
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.prompt_tuning.classifier_loading import usable_device
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.models.masked_lm import DEFAULT_TEMPLATE
from optuna_llm_catalyst.prompt_tuning.models.masked_lm import own_words
from optuna_llm_catalyst.prompt_tuning.pretrained import Head


#: Options that belong to one type of model.
_OWNERS = {
    "prompt_position": "sequence-classifier",
    "template": "masked-lm",
    "verbalizer": "masked-lm",
}
#: What each type of model needs besides the encoder.
_HEADS: dict[str, Head] = {"masked-lm": "masked-lm", "clip": "clip"}


def make(
    options: TuneOptions, task: prompt_tuning.Task
) -> tuple[TaskModel, prompt_tuning.Pretrained]:
    """The task model, and the pretrained one below it; says where that was found."""
    for name, owner in _OWNERS.items():
        if getattr(options, name) and options.model_type != owner:
            raise output.UserError(f"--{name.replace('_', '-')} needs --model-type {owner}.")
    if task.of_images and options.model_type != "clip":
        raise output.UserError(
            f"{options.data} is of images: add --model-type clip and --model, a CLIP or SigLIP "
            "model such as google/siglip2-base-patch16-224."
        )
    verbalizers = _verbalizers(options, task)
    pretrained = prompt_tuning.load_pretrained(
        options.model,
        device=usable_device(options.device, called="--device"),
        trust_remote_code=options.trust_remote_code,
        head=_HEADS.get(options.model_type, "none"),
    )
    output.say(f"Model {pretrained.name} from {pretrained.source}.")
    if options.model_type == "dual-encoder":
        return prompt_tuning.DualEncoderClassifier(pretrained, task.labels), pretrained
    if options.model_type == "clip":
        return prompt_tuning.CLIPClassifier(pretrained, task.labels), pretrained
    length = options.num_virtual_tokens
    if options.model_type == "sequence-classifier":
        model: TaskModel = prompt_tuning.SequenceClassifier(
            pretrained,
            task.labels,
            max_virtual_tokens=length,
            prompt_position=options.prompt_position or "behind_cls",
        )
        return model, pretrained
    model = prompt_tuning.MaskedLMClassifier(
        pretrained,
        task.labels,
        template=options.template or DEFAULT_TEMPLATE,
        verbalizers=verbalizers,
        max_virtual_tokens=length,
    )
    return model, pretrained


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
