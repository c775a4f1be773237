"""A frozen model with a task on top: prompts and a batch to logits.

Shapes: ``P`` prompts at once, ``L`` virtual tokens, ``d`` width, ``B`` examples of ``T`` tokens,
``C`` labels. Training has ``P = 1``; screening scores all candidates in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import threading
from typing import Any
from typing import Protocol

import torch
from torch import nn
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example


#: Trainable tensors beside the prompt, by name, each with a leading dimension ``P``.
Head = dict[str, Tensor]


@dataclass(frozen=True)
class EncodedSplit:
    """Examples as a model takes them, on its device.

    Attributes:
        labels: Label indices, of shape ``(B,)``.
        inputs: Tensors with one row an example.
        lengths: Tokens of each example; equal where length costs nothing.
    """

    labels: Tensor
    inputs: Mapping[str, Tensor]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Sequence[int]) -> EncodedSplit:
        """The examples of these indices, padded no further than the longest of them."""
        index = torch.tensor(indices, device=self.labels.device)
        lengths = tuple(self.lengths[i] for i in indices)
        longest = max(lengths)
        inputs = {
            name: rows[index] if name == "features" else rows[index, :longest]
            for name, rows in self.inputs.items()
        }
        return EncodedSplit(self.labels[index], inputs, lengths)


class TaskModel(Protocol):
    """What a stage needs of a model. ``encoder`` is frozen and in eval mode, for good."""

    @property
    def encoder(self) -> nn.Module:
        """The frozen model; its forward passes are what is counted."""
        ...

    @property
    def word_embeddings(self) -> Tensor:
        """The input embeddings, of shape ``(V, d)``."""
        ...

    @property
    def name(self) -> str:
        """Name of the pretrained model."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names."""
        ...

    @property
    def batch_size(self) -> int:
        """Examples a training batch, unless a stage says otherwise."""
        ...

    @property
    def max_virtual_tokens(self) -> int:
        """The longest prompt that fits into the encoder's positions."""
        ...

    def evaluation_batch_size(self, n_prompts: int) -> int:
        """Examples a batch when ``n_prompts`` prompts are evaluated at once, without gradients."""
        ...

    def encode(self, examples: Sequence[Example]) -> EncodedSplit:
        """Examples to tensors, once; whatever the prompt cannot change is computed here."""
        ...

    def fresh_head(self, prompts: Tensor, train: EncodedSplit) -> Head:
        """A head for each prompt, of shape ``(P, L, d)``; the same arguments give the same."""
        ...

    def logits(self, prompts: Tensor, head: Head, batch: EncodedSplit) -> Tensor:
        """Logits of shape ``(P, B, C)``, differentiable in ``prompts`` and ``head``."""
        ...


@dataclass
class Passes:
    """How often a frozen model was run: the currency in which methods are compared.

    Attributes:
        forward: Forward passes, each over one batch.
        backward: Backward passes.
        sequences: Sequences in the forward passes.
    """

    forward: int = 0
    backward: int = 0
    sequences: int = 0


@contextmanager
def counted_passes(model: TaskModel) -> Iterator[Passes]:
    """Counts every pass of this thread through the frozen model, whoever makes it."""
    passes = Passes()
    owner = threading.get_ident()

    def forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != owner:  # Another trial's, with `n_jobs` above 1.
            return
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        passes.forward += 1
        passes.sequences += len(given if given is not None else args[0])
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(backward)

    def backward(_: Tensor) -> None:
        passes.backward += 1

    handle = model.encoder.register_forward_hook(forward, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def freeze(encoder: nn.Module) -> None:
    """Eval mode, and no gradients on the weights."""
    encoder.eval()
    encoder.requires_grad_(False)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the hidden states (N, T, d) where the mask (N, T) is one, in float32."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)  # (N, d)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each prompt: logits (P, B, C), labels (B,) to (P,), in nats."""
    n_prompts = logits.shape[0]
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n_prompts), reduction="none")
    return each.view(n_prompts, -1).mean(1)


@dataclass(frozen=True)
class Metrics:
    """What prompts are worth on a split.

    Attributes:
        loss: Mean cross entropy of each prompt, in nats.
        accuracy: Accuracy of each prompt, in [0, 1].
        predictions: Predicted label indices, of shape ``(P, n)``, on the CPU.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    predictions: Tensor


def evaluate(model: TaskModel, prompts: Tensor, head: Head, split: EncodedSplit) -> Metrics:
    """Evaluates ``P`` prompts of shape ``(P, L, d)`` on a split, without gradients."""
    order = sorted(range(len(split)), key=lambda i: split.lengths[i])
    batch_size = model.evaluation_batch_size(len(prompts))
    loss = torch.zeros(len(prompts), dtype=torch.float64)
    predictions = torch.empty(len(prompts), len(split), dtype=torch.long)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = split.select(indices)
            logits = model.logits(prompts, head, batch)  # (P, B, C)
            loss += losses(logits, batch.labels).cpu().double() * len(batch)
            predictions[:, indices] = logits.argmax(-1).cpu()
    accuracy = (predictions == split.labels.cpu()).double().mean(-1)
    return Metrics(tuple((loss / len(split)).tolist()), tuple(accuracy.tolist()), predictions)
