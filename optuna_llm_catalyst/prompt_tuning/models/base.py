"""A frozen model with a task on top: prompts and examples to log-probabilities.

Shapes: ``P`` prompts at once, ``L`` virtual tokens, ``d`` width, ``B`` examples of ``T`` tokens,
``C`` labels. Training has ``P = 1``; screening scores all candidates at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol
from typing import runtime_checkable

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.meter import Passes
from optuna_llm_catalyst.prompt_tuning.prompts import Placement
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split


SOFT = SoftPrompt()


class TaskModel(Protocol):
    """What stages, the projection and the objective need of a model. Its weights never change.

    Attributes:
        name: Name of the pretrained model; never empty.
        fingerprint: Tells models of one name apart: how it classifies, its config, tokenizer and
            weights.
        labels: The label names.
        mechanism: In a sentence for an LLM: where the prompt stands and how a label is read.
        placement: Where virtual tokens can stand.
        settings: What of its own settings changes losses: a temperature, where texts are cut.
        vocab_size: Token ids that the model embeds.
        device: Where its tensors live.
        batch_size: Examples a training batch, unless a stage says otherwise.
        is_differentiable: Whether gradients reach the prompt; a black box has none to give.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def mechanism(self) -> str: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def settings(self) -> Mapping[str, float | str | None]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def is_differentiable(self) -> bool: ...

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """The embeddings of ``P`` hard prompts in float32, of shape ``(P, L, d)``."""

    def encode(self, examples: Sequence[Example]) -> Split:
        """Examples to tensors, once; whatever the prompt cannot change is computed here."""

    def start(
        self, token_ids: Sequence[Sequence[int]], train: Split, kind: PromptKind = SOFT
    ) -> Prompt:
        """``P`` prompts that start at words, each with a fresh head where the model has one.

        The same arguments give the same prompts.
        """

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        """Log-probabilities of the labels, of shape ``(P, B, C)``.

        Differentiable in the prompt's tensors. No single pass grows with ``P``, ``B`` or ``C``.
        """

    def spreads(self, prompt: Prompt, batch: Split) -> dict[str, float]:
        """The standard deviations of what the trained tensors of a prompt stand among.

        Search without gradients takes steps of these sizes: by name, embeddings or hidden states.
        """

    def metered(self) -> AbstractContextManager[Passes]:
        """Counts this thread's passes through the frozen model within a ``with`` block."""


@runtime_checkable
class HasHead(Protocol):
    """A task model with a linear head on features that depend on the prompt."""

    def prompted_features(self, prompt: Prompt, batch: Split) -> Tensor:
        """What the head reads of each text under each prompt, of shape ``(P, B, d)``."""

    def fresh_head(self, prompt: Prompt, train: Split) -> Prompt:
        """The prompts with heads that are fitted to the frozen encoder under them."""


def reads_images(model: object) -> bool:
    """Whether a model reads images: their paths are the texts of its examples."""
    return bool(getattr(model, "reads_images", False))


def losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each prompt: (P, B, C) and (B,) to (P,), in nats."""
    n_prompts = log_probs.shape[0]
    each = F.nll_loss(log_probs.flatten(0, 1), labels.repeat(n_prompts), reduction="none")
    return each.view(n_prompts, -1).mean(1)


@dataclass(frozen=True)
class Metrics:
    """What prompts are worth on a split.

    Attributes:
        loss: Mean cross entropy of each prompt, in nats.
        accuracy: Accuracy of each prompt, in [0, 1].
        predictions: Predicted label indices, of shape ``(P, n)``, on the CPU.
        log_probs: Log-probabilities of the labels, of shape ``(P, n, C)``, on the CPU.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    predictions: Tensor
    log_probs: Tensor


@torch.inference_mode()
def evaluate(model: TaskModel, prompt: Prompt, split: Split) -> Metrics:
    """Evaluates ``P`` prompts on a split, without gradients."""
    log_probs, labels = model.log_probs(prompt, split).cpu(), split.labels.cpu()  # (P, n, C)
    predictions = log_probs.argmax(-1)
    accuracy = (predictions == labels).double().mean(-1)
    loss = losses(log_probs, labels)
    return Metrics(tuple(loss.tolist()), tuple(accuracy.tolist()), predictions, log_probs)
