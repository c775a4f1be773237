"""Several stages of a study at once: their prompts are trained in one expanded batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from itertools import product
from typing import Any

import optuna
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_llm_catalyst.prompt_tuning.stage_runner import StageRunner
from optuna_llm_catalyst.prompt_tuning.stage_setup import ReadyStage
from optuna_llm_catalyst.prompt_tuning.stages import BatchStage


Callback = Callable[[optuna.Study, FrozenTrial], None]


def run(
    study: optuna.Study,
    n_trials: int,
    ready: Callable[[Trial], ReadyStage],
    runner: StageRunner,
    callbacks: Sequence[Callback] = (),
) -> list[FrozenTrial]:
    """Asks for trials, runs their stages together where they can be, and tells their values.

    If one of them raises, those that are not finished fail, and the error goes on.
    """
    waiting: list[Trial] = []
    finished: list[FrozenTrial] = []

    def tell(trial: BaseTrial, value: float | None) -> None:
        assert isinstance(trial, Trial)
        waiting.remove(trial)
        state = TrialState.PRUNED if value is None else None
        # Somebody else may have ended it.
        finished.append(study.tell(trial, value, state=state, skip_if_finished=True))

    try:
        stages: list[ReadyStage] = []
        for _ in range(n_trials):
            waiting.append(study.ask())
            try:
                stages.append(ready(waiting[-1]))
            except optuna.TrialPruned:
                tell(waiting[-1], None)
                continue
            if stages[-1].plan.reading.is_trained:  # Others may read under its text prompt.
                stage = stages.pop()
                (value,) = runner.run_together([stage])
                tell(stage.trial, value)
        for group in alike(stages):
            for stage, value in zip(group, runner.run_together(group), strict=True):
                tell(stage.trial, value)
    finally:
        for trial in waiting:
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    for of_trial, callback in product(finished, callbacks):
        callback(study, of_trial)
    return finished


def alike(stages: Sequence[ReadyStage]) -> list[list[ReadyStage]]:
    """Groups of stages that differ in their trials and starts alone; others are by themselves."""
    groups: list[tuple[Any, list[ReadyStage]]] = []
    for stage in stages:
        group = next((members for sign, members in groups if sign == _sign(stage)), None)
        if group is None or not isinstance(stage.stage, BatchStage):
            groups.append((_sign(stage), [stage]))
        else:
            group.append(stage)
    return [members for _, members in groups]


def _sign(stage: ReadyStage) -> tuple[Any, ...]:
    """Equal for stages that can run together."""
    shapes = {name: tensor.shape for name, tensor in stage.start.tensors.items()}
    return stage.stage, stage.plan.reading, stage.start.kind, shapes, stage.patience
