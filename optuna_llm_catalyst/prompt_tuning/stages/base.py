"""The seam between the objective and a training method: a restart prompt to a trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import TaskModel


@dataclass(frozen=True)
class Evaluation:
    """A soft prompt at one moment of a stage.

    Attributes:
        index: 0 before training, then 1, 2, … at each evaluation.
        step: Optimiser steps done.
        prompt: A copy of the soft prompt, of shape ``(L, d)``.
        head: A copy of the head.
        loss: Validation loss in nats.
        accuracy: Validation accuracy in [0, 1].
        predictions: Predicted label indices of the validation examples, of shape ``(n,)``; None
            if the stage does not know them.
    """

    index: int
    step: int
    prompt: Tensor
    head: Head
    loss: float
    accuracy: float
    predictions: Tensor | None = None


#: Sees each evaluation as it is made; returns whether to stop the stage there.
Observer = Callable[[Evaluation], bool]


@dataclass(frozen=True)
class StageResult:
    """What a stage came to.

    Attributes:
        best: The evaluation of the lowest validation loss: a stage accepts only what improved,
            so this is the restart prompt itself if training made it worse.
        n_steps: Optimiser steps really done.
        stopped: Whether the observer stopped the stage.
    """

    best: Evaluation
    n_steps: int
    stopped: bool


class Stage(Protocol):
    """One stage of prompt tuning. Laws: the same arguments give the same result; the model's
    weights are bit-identical afterwards; nothing is carried over from an earlier stage."""

    @property
    def n_steps(self) -> int:
        """The budget in optimiser steps."""
        ...

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
        """Trains from a prompt.

        Args:
            model: The frozen model.
            prompt: Where to start, of shape ``(L, d)``.
            train: What to train on.
            validation: What evaluations are made on.
            head: A trained head to go on with; by default a fresh one.
            seed: Seed of the batches' order.
            observe: Called at each evaluation, the first before training.
        """
        ...
