"""Runs a stage: shows its evaluations to the pruner, and leaves what it came to on its trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
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
from optuna_llm_catalyst.prompt_tuning.stage_recorder import StageRecorder
from optuna_llm_catalyst.prompt_tuning.stage_setup import ReadyStage
from optuna_llm_catalyst.prompt_tuning.stages import BatchStage
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import needs_gradient
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
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
        n_checked_swaps: Word swaps measured for each new projection, or drift.
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

    def run(self, ready: ReadyStage) -> float:
        """Runs a stage and records it on its trial, whose passes are being counted.

        Returns:
            The value of its best evaluation.

        Raises:
            optuna.TrialPruned: If the study's pruner stopped it.
        """
        watch = self._watch(ready)
        result = ready.stage.run(replace(watch.run, observe=watch))
        value = self._recorded(ready, watch, result, ready.passes)
        if value is None:
            raise optuna.TrialPruned(f"at step {result.spent}")
        return value

    def run_together(self, stages: Sequence[ReadyStage]) -> Iterator[float | None]:
        """Runs stages in one expanded batch, and records one after the other.

        Each of them counts the passes of the batch as its own, and its part of the sequences.

        Args:
            stages: Some that differ in their trials and their starts alone, or a single one.

        Yields:
            The value of each, None if the study's pruner stopped it, or somebody ended its trial.
        """
        watches = [self._watch(ready) for ready in stages]
        runs = [replace(watch.run, observe=watch.tolerant) for watch in watches]
        method = stages[0].stage
        with self._model.metered() as passes:
            if isinstance(method, BatchStage):
                results = method.run_batch(runs)
            else:
                results = [method.run(run) for run in runs]
        for watch in watches:
            passes.take(watch.passes)
        passes.sequences //= len(stages)
        for ready, watch, result in zip(stages, watches, results, strict=True):
            if watch.is_ended:
                yield None
                continue
            with self._model.metered() as own:
                for part in (ready.passes, passes, watch.passes):
                    own.add(part)
                value = self._recorded(ready, watch, result, own)
            yield value

    def _watch(self, ready: ReadyStage) -> _Watch:
        plan = ready.plan
        run = Run(
            self._model, ready.start, plan.train, plan.validation, self._seed, metric=self._metric
        )
        projector = self._projector(run, ready.prompt, ready.stage)
        # A stage that trains a text prompt is trained in another way than those that it would be
        # compared with, and later ones rest on it.
        can_be_pruned = not plan.reading.is_trained
        return _Watch(ready.trial, run, projector, self._observe, ready.patience, can_be_pruned)

    def _recorded(
        self, ready: ReadyStage, watch: _Watch, result: StageResult, passes: Passes
    ) -> float | None:
        """Records a stage on its trial. Returns its value, None if the pruner stopped it."""
        is_pruned = result.stopped and watch.is_pruned
        self._recorder.record(
            ready.trial,
            ready.prompt,
            ready.plan,
            result,
            watch.trajectory(result.best),
            passes,
            is_pruned=is_pruned,
        )
        return None if is_pruned else result.best.value

    def _projector(self, run: Run, prompt: RestartPrompt, stage: Stage) -> Projector:
        return Projector(
            # Words are measured before the labels alone: before texts they would be dear.
            replace(run, start=sides(run.start)[0]),
            self._table_with(prompt.token_ids),
            distance=self._distance,
            n_checked_swaps=self._n_checked_swaps,
            # A stage that does without gradients has words that cost none, either.
            by_gradient=needs_gradient(stage),
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
    """Sees the evaluations of one stage, reports them and says whether to stop there.

    ``run`` is the stage's, and ``passes`` are those that were spent on what is reported.
    """

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
        self.is_ended = False
        self.passes = Passes()
        self.run = run
        self._trial = trial
        self._projector = projector
        self._observe = observe
        self._patience = math.inf if patience is None else patience
        self._can_be_pruned = can_be_pruned
        self._points: dict[int, TrajectoryPoint] = {}
        self._best: Evaluation | None = None
        self._n_worse = 0

    def __call__(self, evaluation: Evaluation) -> bool:
        with self.run.model.metered() as passes:
            stops = self._sees(evaluation)
        self.passes.add(passes)
        return stops

    def tolerant(self, evaluation: Evaluation) -> bool:
        """The same, but a trial that somebody else ended ends its own stage only."""
        try:
            return self(evaluation)
        except optuna.exceptions.UpdateFinishedTrialError:
            self.is_ended = True
            return True

    def _sees(self, evaluation: Evaluation) -> bool:
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
        if self._best is None or self.run.is_better(evaluation, self._best):
            self._best, self._n_worse = evaluation, 0
        else:
            self._n_worse += 1
        return self._best

    def trajectory(self, best: Evaluation) -> Trajectory:
        """The stage's trajectory, with its best evaluation: a stage need not show that."""
        if best.step not in self._points:
            self._points[best.step] = self._projector.point(best)
        return Trajectory(tuple(self._points[step] for step in sorted(self._points)))
