"""What the frozen features are worth without a study: the rows that a report starts with."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Protocol
from typing import runtime_checkable

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import SplitName
from optuna_llm_catalyst.prompt_tuning.ensemble import ComparesFeatures
from optuna_llm_catalyst.prompt_tuning.linear_fit import Data
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_readout
from optuna_llm_catalyst.prompt_tuning.linear_fit import linear_probe
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.models import reads_images
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split


NO_PROMPT = "class names alone"
PROBE = "linear probe"
PULLED_PROBE = "probe pulled to class names"

#: Words before a label's name that fit any task. The names alone are used besides.
TEMPLATES = (
    "a",
    "this is a",
    "it is about",
    "the topic is",
    "an example of",
    "this text is about",
    "the right label is",
)
IMAGE_TEMPLATES = (
    "a",
    "a photo of a",
    "a photo of the",
    "a good photo of a",
    "a close-up photo of a",
    "a picture of a",
    "an image of",
)

Encode = Callable[[str], Sequence[int]]


@runtime_checkable
class HasTextFeatures(Protocol):
    """A model that has unit features of texts without a prompt."""

    def text_features(self, split: Split) -> Tensor:
        """Unit features of plain texts, of shape ``(n, d)``."""


def readouts(model: TaskModel, data: EncodedTask, encode: Encode) -> dict[str, Readout]:
    """Readouts of plain texts' features, by the names of a report's rows.

    Args:
        model: The frozen model.
        data: The task, encoded.
        encode: Words to the model's token ids.
    """
    if not isinstance(model, HasTextFeatures):
        return {}
    train, validation = (_examples(model, data, name) for name in ("train", "validation"))
    probe = linear_probe(train, validation, len(model.labels))
    if not isinstance(model, ComparesFeatures):
        return {PROBE: probe}
    names = Readout(_class_names(model), model.scale)
    start = Readout(_templates(model, encode), model.scale)
    pulled = fit_readout(train, validation, start).readout
    return {NO_PROMPT: names, PROBE: probe, PULLED_PROBE: pulled}


def _examples(model: HasTextFeatures, data: EncodedTask, name: SplitName) -> Data:
    split = data.split(name)
    return model.text_features(split), split.labels


def _class_names(model: ComparesFeatures) -> Tensor:
    with torch.inference_mode():
        return model.class_features(None)[0].clone()  # (C, d)


def _templates(model: TaskModel, encode: Encode) -> Tensor:
    """Unit class features, the mean over the names alone and in each template: (C, d)."""
    assert isinstance(model, ComparesFeatures)
    found = [_class_names(model)]
    templates = IMAGE_TEMPLATES if reads_images(model) else TEMPLATES
    # A small vocabulary may know none of a template's words.
    for token_ids in filter(None, (list(encode(template)) for template in templates)):
        words = model.embed([token_ids])  # (1, L, d)
        prompt = Prompt(SoftPrompt(), {"labels": words})
        with torch.inference_mode():
            found.append(model.class_features(prompt)[0].clone())
    return F.normalize(torch.stack(found).mean(0), dim=-1)
