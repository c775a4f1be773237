"""The interface of a training method: it improves a prompt within a budget."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Protocol
from typing import runtime_checkable

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.metrics import LOSS
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A prompt at one moment of a stage.

    Attributes:
        step: What of the budget was spent until then: optimiser steps, or queries.
        prompt: A copy of the prompt and its head, with ``P = 1``.
        loss: Validation loss in nats.
        accuracy: Validation accuracy in [0, 1].
        value: Its value on the validation split by the run's metric.
        predictions: Predicted label indices of the validation examples, of shape ``(n,)``; None
            if the stage does not know them.
    """

    step: int
    prompt: Prompt
    loss: float
    accuracy: float
    value: float
    predictions: Tensor | None = None


#: Sees each evaluation as it is made; returns whether to stop the stage there.
Observer = Callable[[Evaluation], bool]


def _go_on(_: Evaluation) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Run:
    """All that a stage is given.

    Attributes:
        model: The frozen model.
        start: The prompt to start from and its head, with ``P = 1``.
        train: What to train on.
        validation: What evaluations are made on.
        seed: Seed of everything random, such as the batches' order.
        observe: Called at each evaluation, the first before training.
        metric: By what evaluations are compared.
    """

    model: TaskModel
    start: Prompt
    train: Split
    validation: Split
    seed: int = 0
    observe: Observer = _go_on
    metric: Metric = LOSS

    def evaluate(self, prompt: Prompt, step: int) -> Evaluation:
        """Evaluates a copy of a prompt (``P = 1``) on the validation split."""
        return self.evaluate_each(prompt, step)[0]

    def evaluate_each(self, prompts: Prompt, step: int) -> list[Evaluation]:
        """Evaluates a copy of each of ``P`` prompts on the validation split, in batched passes."""
        copy = prompts.map(lambda tensor: tensor.detach().clone())
        found = evaluate(self.model, copy, self.validation)
        return [
            Evaluation(
                step,
                copy[[i]],
                found.loss[i],
                found.accuracy[i],
                self.metric.value(self.validation.labels, found.log_probs[i]),
                found.predictions[i],
            )
            for i in range(len(copy))
        ]

    @torch.no_grad()
    def losses(self, prompts: Prompt, batch: Split) -> list[float]:
        """The loss of each of ``P`` prompts on a batch; what is no number is infinite."""
        return self.losses_of(self.model.log_probs(prompts, batch), batch.labels)

    @staticmethod
    def losses_of(log_probs: Tensor, labels: Tensor) -> list[float]:
        """The same of log-probabilities (P, B, C) and labels (B,)."""
        found = losses(log_probs, labels).cpu().double()
        return found.nan_to_num(nan=math.inf, posinf=math.inf).tolist()

    def is_better(self, one: Evaluation, other: Evaluation | None) -> bool:
        """Whether an evaluation is better than another, by the metric and then by the loss.

        What is not a number is never better, and any evaluation is better than none.
        """
        rank = self.metric.rank
        return other is None or rank(one.value, one.loss) < rank(other.value, other.loss)


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage came to.

    Attributes:
        best: The best evaluation by the run's metric: a stage accepts only what improved, so
            this is the start itself if training made it worse.
        spent: What of the budget was really spent.
        stopped: Whether the observer stopped the stage.
    """

    best: Evaluation
    spent: int
    stopped: bool


class Stage(Protocol):
    """One stage of prompt tuning. Laws: the same run gives the same result; the model's weights
    are bit-identical afterwards; nothing is carried over from an earlier stage.

    A stage that asks for no gradient has an attribute ``needs_gradient`` that is False.
    """

    @property
    def budget(self) -> int:
        """What a run may spend, in the method's own unit: optimiser steps, or queries."""

    def with_budget(self, budget: int) -> Stage:
        """The same stage with another budget."""

    def run(self, run: Run) -> StageResult:
        """Trains from the run's start."""


@runtime_checkable
class BatchStage(Stage, Protocol):
    """A stage that trains many prompts in one expanded batch, each as if it were alone."""

    def run_batch(self, runs: Sequence[Run]) -> list[StageResult]:
        """Trains from the starts of runs that share all but these and their observers."""


def needs_gradient(stage: Stage) -> bool:
    """Whether a stage asks for gradients: it does unless it says otherwise."""
    return bool(getattr(stage, "needs_gradient", True))
