"""A task's splits as a model takes them, encoded once under each text prompt."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
from typing import Literal
from typing import Protocol

from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import one_side
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split


SplitName = Literal["train", "validation", "test"]


class EncodedTask:
    """The splits of a task, encoded when they are first needed and kept.

    Args:
        model: The model that encodes them.
        task: The task.
    """

    def __init__(self, model: TaskModel, task: Task) -> None:
        self._model = model
        self._task = task
        self._splits: dict[tuple[SplitName, str], Split] = {}

    def split(self, name: SplitName, text_prompt: Prompt | None = None) -> Split:
        """A split; under a text prompt that no longer changes, if one is given."""
        key = (name, "" if text_prompt is None else digest(text_prompt))
        if key not in self._splits:
            self._splits[key] = encode(self._model, getattr(self._task, name), text_prompt)
        return self._splits[key]

    def read(self, prompt: Prompt, name: SplitName) -> tuple[Prompt, Split]:
        """What of a prompt stands before the labels, and a split under what stands before texts.

        Both go to ``log_probs`` and give what the whole prompt gives on plain texts.
        """
        labels, texts = sides(prompt)
        return labels, self.split(name, texts)


class EncodesUnder(Protocol):
    """A model that encodes texts under a prompt that no longer changes."""

    def encode(self, examples: Sequence[Example], *, under: Prompt | None = None) -> Split: ...


def encode(model: TaskModel, examples: Sequence[Example], text_prompt: Prompt | None) -> Split:
    """Examples as a model takes them, under a text prompt if there is one."""
    if text_prompt is None:
        return model.encode(examples)
    reader: EncodesUnder = model  # type: ignore[assignment]  # Its prompts have two sides.
    return reader.encode(examples, under=text_prompt)


def sides(prompt: Prompt) -> tuple[Prompt, Prompt | None]:
    """The trained part of a prompt, and what stands before the texts where that is another."""
    if not prompt.tensors.keys() >= {"labels", "texts"}:
        return prompt, None
    return one_side(prompt, "labels"), one_side(prompt, "texts")


def digest(prompt: Prompt) -> str:
    """Tells prompts apart by every bit of their tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(prompt.tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().numpy().tobytes())
