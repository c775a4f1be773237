"""Runs a stage: shows its evaluations to the pruner, and leaves what it came to on its trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
import math

import optuna
from optuna.trial import BaseTrial

from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.projection import Distance
from optuna_llm_catalyst.prompt_tuning.projection import Projector
from optuna_llm_catalyst.prompt_tuning.projection import word_table
from optuna_llm_catalyst.prompt_tuning.projection import WordTable
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlan
from optuna_llm_catalyst.prompt_tuning.stage_recorder import StageRecorder
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import needs_gradient
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.trajectory import Trajectory
from optuna_llm_catalyst.trajectory import TrajectoryPoint


Observe = Callable[[BaseTrial, Evaluation], None]


class StageRunner:
    """Runs the stages of an objective, whose arguments of the same names these are.

    Args:
        model: The frozen model.
        space: The space of prompts.
        recorder: Where results go.
        metric: What the value of a stage is.
        seed: Seed of the batches' order.
        distance: How near words are found.
        n_checked_swaps: Word swaps measured for each new projection.
        observe: Called at each evaluation.
    """

    def __init__(
        self,
        model: TaskModel,
        space: PromptSpace,
        recorder: StageRecorder,
        *,
        metric: Metric,
        seed: int,
        distance: Distance,
        n_checked_swaps: int,
        observe: Observe | None,
    ) -> None:
        self._model = model
        self._space = space
        self._recorder = recorder
        self._metric = metric
        self._seed = seed
        self._distance: Distance = distance
        self._n_checked_swaps = n_checked_swaps
        self._observe = observe

    def run(
        self,
        trial: BaseTrial,
        stage: Stage,
        prompt: RestartPrompt,
        start: Prompt,
        plan: StagePlan,
        passes: Passes,
        patience: int | None = None,
    ) -> float:
        """Runs a stage and records it on its trial.

        Args:
            trial: The trial.
            stage: What it does.
            prompt: The restart prompt.
            start: What it trains, with ``P = 1``.
            plan: What it reads.
            passes: Counts the trial's passes.
            patience: Evaluations in a row without a better one after which the stage ends,
                whatever its own patience is; None for as many as it has.

        Returns:
            The value of its best evaluation.

        Raises:
            optuna.TrialPruned: If the study's pruner stopped it.
        """
        run = Run(self._model, start, plan.train, plan.validation, self._seed, metric=self._metric)
        # A stage that trains a text prompt is trained in another way than those that it would be
        # compared with, and later ones rest on it.
        can_be_pruned = not plan.reading.is_trained
        watch = _Watch(
            trial, run, self._projector(run, prompt, stage), self._observe, patience, can_be_pruned
        )
        result = stage.run(replace(run, observe=watch))
        trajectory, is_pruned = watch.trajectory(result.best), result.stopped and watch.is_pruned
        self._recorder.record(trial, prompt, plan, result, trajectory, passes, is_pruned=is_pruned)
        if is_pruned:
            raise optuna.TrialPruned(f"at step {result.spent}")
        return result.best.value

    def _projector(self, run: Run, prompt: RestartPrompt, stage: Stage) -> Projector:
        return Projector(
            # Words are measured before the labels alone: before texts they would be dear.
            replace(run, start=sides(run.start)[0]),
            self._table_with(prompt.token_ids),
            distance=self._distance,
            # Gradients say which swaps are worth measuring.
            n_checked_swaps=self._n_checked_swaps if needs_gradient(stage) else 0,
        )

    def _table_with(self, token_ids: Sequence[int]) -> WordTable:
        """The table of whole words, and for this stage the start's own tokens besides."""
        if all(token_id in self._space.whole_words for token_id in token_ids):
            return self._table
        return word_table(self._space, self._model.embed, also=token_ids)

    @cached_property
    def _table(self) -> WordTable:
        return word_table(self._space, self._model.embed)


class _Watch:
    """Sees the evaluations of one stage, reports them and says whether to stop there."""

    def __init__(
        self,
        trial: BaseTrial,
        run: Run,
        projector: Projector,
        observe: Observe | None,
        patience: int | None,
        can_be_pruned: bool,
    ) -> None:
        self.is_pruned = False
        self._trial = trial
        self._run = run
        self._projector = projector
        self._observe = observe
        self._patience = math.inf if patience is None else patience
        self._can_be_pruned = can_be_pruned
        self._points: dict[int, TrajectoryPoint] = {}
        self._best: Evaluation | None = None
        self._n_worse = 0

    def __call__(self, evaluation: Evaluation) -> bool:
        best, step = self._better(evaluation), evaluation.step
        if step not in self._points:
            self._trial.report(best.value if math.isfinite(best.value) else math.nan, step)
        if step not in self._points or evaluation is best:
            self._points[step] = self._projector.point(evaluation)
        if self._observe is not None:
            self._observe(self._trial, evaluation)
        # An untrained prompt says nothing of where its stage will end.
        self.is_pruned = step > 0 and self._can_be_pruned and self._trial.should_prune()
        return self.is_pruned or self._n_worse >= self._patience

    def _better(self, evaluation: Evaluation) -> Evaluation:
        """The best evaluation so far."""
        if self._best is None or self._run.is_better(evaluation, self._best):
            self._best, self._n_worse = evaluation, 0
        else:
            self._n_worse += 1
        return self._best

    def trajectory(self, best: Evaluation) -> Trajectory:
        """The stage's trajectory, with its best evaluation: a stage need not show that."""
        if best.step not in self._points:
            self._points[best.step] = self._projector.point(best)
        return Trajectory(tuple(self._points[step] for step in sorted(self._points)))
