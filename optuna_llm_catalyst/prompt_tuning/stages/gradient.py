"""Plain gradient descent on the prompt's embeddings, and on the head where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Literal

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.stages.base import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages.base import Observer
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult


@dataclass(frozen=True)
class GradientStage:
    """A stage of gradient descent, with a fresh optimiser.

    Attributes:
        n_steps: Optimiser steps.
        lr: Learning rate of the prompt.
        head_lr: Learning rate of the head, where the model has one.
        optimizer: ``adamw`` or ``sgd`` (with momentum 0.9).
        weight_decay: Decoupled weight decay of the prompt; 0 keeps it from being pulled to the
            origin, where no word is.
        batch_size: Examples a batch; None for the model's own.
        eval_every: Steps between two evaluations; the start and the end are always evaluated.
    """

    n_steps: int = 60
    lr: float = 5e-3
    head_lr: float = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    batch_size: int | None = None
    eval_every: int = 10

    def __post_init__(self) -> None:
        for name, least in (("n_steps", 0), ("batch_size", 1), ("eval_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'sgd', got {self.optimizer!r}.")

    def run(
        self,
        model: TaskModel,
        prompt: Tensor,
        train: EncodedSplit,
        validation: EncodedSplit,
        *,
        head: Head | None = None,
        seed: int = 0,
        observe: Observer | None = None,
    ) -> StageResult:
        soft = SoftPrompt(prompt)
        if head is None:
            head = model.fresh_head(soft().detach().unsqueeze(0), train)
        head = {name: rows.detach().clone().requires_grad_() for name, rows in head.items()}
        optimizer = self._optimizer(soft, head)
        batches = bucketed_batches(train.lengths, self.batch_size or model.batch_size, seed)
        best: Evaluation | None = None
        for step in range(self.n_steps + 1):
            if step % self.eval_every == 0 or step == self.n_steps:
                index = math.ceil(step / self.eval_every)
                now = _evaluate(model, soft, head, validation, index=index, step=step)
                # A loss that is not a number is never the best, and never becomes one again.
                best = now if best is None or now.loss < best.loss else best
                stopped = observe is not None and observe(now)
                if stopped or not math.isfinite(now.loss) or step == self.n_steps:
                    break
            batch = train.select(next(batches))
            loss = losses(model.logits(soft().unsqueeze(0), head, batch), batch.labels)[0]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        assert best is not None
        return StageResult(best, step, stopped)

    def _optimizer(self, soft: SoftPrompt, head: Head) -> torch.optim.Optimizer:
        groups = [
            {"params": [soft.embeddings], "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": list(head.values()), "lr": self.head_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.lr)


def bucketed_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, each of like lengths; every example once an epoch.

    Examples are shuffled, sorted by length (ties stay shuffled), cut into batches, and the
    batches are shuffled: little padding, and another order each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    while True:
        order = sorted(torch.randperm(n, generator=generator).tolist(), key=lengths.__getitem__)
        batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _evaluate(
    model: TaskModel,
    soft: SoftPrompt,
    head: Head,
    validation: EncodedSplit,
    *,
    index: int,
    step: int,
) -> Evaluation:
    prompt = soft().detach().clone()
    frozen_head = {name: rows.detach().clone() for name, rows in head.items()}
    metrics = evaluate(model, prompt.unsqueeze(0), frozen_head, validation)
    return Evaluation(
        index=index,
        step=step,
        prompt=prompt,
        head=frozen_head,
        loss=metrics.loss[0],
        accuracy=metrics.accuracy[0],
        predictions=metrics.predictions[0],
    )
