"""Plain gradient descent on the prompt's embeddings, and on the head where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Literal

import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.prompts import is_gate
from optuna_llm_catalyst.prompt_tuning.prompts import is_of
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import stacked
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages.base import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult


_MAX_LR = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class GradientStage:
    """A stage of gradient descent, with a fresh optimiser.

    Attributes:
        n_steps: Optimiser steps.
        lr: Learning rate of the prompt.
        text_lr: Learning rate before the texts, for a prompt that has two sides.
        gate_lr: Learning rate of the gate's weights, for a low-rank prompt.
        head_lr: Learning rate of the head, where the model has one.
        optimizer: ``adamw`` or ``sgd`` (with momentum 0.9).
        weight_decay: Decoupled weight decay of the prompt; 0 keeps it from being pulled to the
            origin, where no word is.
        batch_size: Examples a batch; None for the model's own.
        eval_every: Steps between two evaluations; the start and the end are always evaluated.
        schedule: ``constant``, or ``cosine``: the rates fall to zero along half a cosine.
        patience: Evaluations in a row without a better one after which the stage ends; None to
            spend all steps.
    """

    n_steps: int = 60
    lr: float = 5e-3
    text_lr: float = 5e-3
    gate_lr: float = 1e-4
    head_lr: float = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    batch_size: int | None = None
    eval_every: int = 10
    schedule: Literal["constant", "cosine"] = "constant"
    patience: int | None = None

    def __post_init__(self) -> None:
        check_at_least(0, n_steps=self.n_steps)
        check_at_least(1, batch_size=self.batch_size, eval_every=self.eval_every)
        check_at_least(1, patience=self.patience)
        for name in ("lr", "text_lr", "gate_lr", "head_lr"):
            value = getattr(self, name)
            if not 0 < value <= _MAX_LR:
                raise ValueError(f"`{name}` must be positive and a float32, got {value}.")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'sgd', got {self.optimizer!r}.")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"`schedule` must be 'constant' or 'cosine', got {self.schedule!r}.")

    @property
    def budget(self) -> int:
        return self.n_steps

    def with_budget(self, budget: int) -> GradientStage:
        return replace(self, n_steps=budget)

    def run(self, run: Run) -> StageResult:
        return self.run_batch([run])[0]

    def run_batch(self, runs: Sequence[Run]) -> list[StageResult]:
        """Trains the prompts of several runs at once, each as if it were alone.

        Args:
            runs: They share all but their starts and observers. One that is over trains on
                unseen, as long as another one goes on.
        """
        run, courses = runs[0], [_Course(run) for run in runs]
        prompts = stacked([run.start for run in runs]).map(_trainable)  # P = len(runs)
        optimizer = self._optimizer(prompts)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        size = self.batch_size or run.model.batch_size
        batches = bucketed_batches(run.train.lengths, size, run.seed)
        for step in range(self.n_steps + 1):
            if step % self.eval_every == 0 or step == self.n_steps:
                found = run.evaluate_each(self._judged(run, prompts), step)
                for course, now in zip(courses, found, strict=True):
                    course.go_on(now, self.patience)
                if step == self.n_steps or all(course.is_over for course in courses):
                    break
            batch = run.train.select(next(batches))
            loss = self._losses(run, prompts, batch).sum()  # No prompt's gradient is another's.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rates.step()
        return [course.result() for course in courses]

    def _losses(self, run: Run, prompts: Prompt, batch: Split) -> Tensor:
        """What is lowered on a batch, of each prompt: (P,)."""
        return losses(run.model.log_probs(prompts, batch), batch.labels)

    def _judged(self, run: Run, prompts: Prompt) -> Prompt:
        """The prompts as they are evaluated and kept."""
        del run
        return prompts

    def _rate(self, step: int) -> float:
        """The part of its rate with which a step is made."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / max(self.n_steps, 1)))

    def _optimizer(self, prompt: Prompt) -> torch.optim.Optimizer:
        head: list[Tensor] = []
        gate: list[Tensor] = []
        texts: list[Tensor] = []
        rest: list[Tensor] = []
        for name, tensor in prompt.tensors.items():
            if is_of(name, "head"):
                head.append(tensor)
            elif is_gate(name):
                gate.append(tensor)
            elif is_of(name, "texts") and "labels" in prompt.tensors:
                texts.append(tensor)
            else:
                rest.append(tensor)
        groups = [
            {"params": rest, "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": texts, "lr": self.text_lr, "weight_decay": self.weight_decay},
            {"params": gate, "lr": self.gate_lr, "weight_decay": self.weight_decay},
            {"params": head, "lr": self.head_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.lr)


class _Course:
    """How one run of a batch goes: its best evaluation, and whether it is over."""

    def __init__(self, run: Run) -> None:
        self.is_over = False
        self._run = run
        self._best: Evaluation | None = None
        self._n_worse = 0
        self._spent = 0
        self._stopped = False

    def go_on(self, now: Evaluation, patience: int | None) -> None:
        """Sees the next evaluation, unless it is over."""
        if self.is_over:
            return
        self._spent = now.step
        if self._run.is_better(now, self._best):
            self._best, self._n_worse = now, 0
        else:
            self._n_worse += 1
        self._stopped = self._run.observe(now)
        # A loss that is not a number never becomes one again.
        is_lost = not math.isfinite(now.loss)
        self.is_over = self._stopped or self._n_worse == patience or is_lost

    def result(self) -> StageResult:
        assert self._best is not None
        return StageResult(self._best, self._spent, self._stopped)


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


def _trainable(tensor: Tensor) -> Tensor:
    # In float32 whatever the model's precision is: small steps vanish in half precision.
    return tensor.detach().to(torch.float32, copy=True).requires_grad_()
