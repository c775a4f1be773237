"""Trial to value: one stage of prompt tuning a trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Literal
from typing import TYPE_CHECKING

import optuna
from optuna.trial import BaseTrial

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning import batches
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import checks
from optuna_llm_catalyst.prompt_tuning import refining
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.metrics import as_metric
from optuna_llm_catalyst.prompt_tuning.metrics import LOSS
from optuna_llm_catalyst.prompt_tuning.metrics import Measure
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.metrics import TestScore
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.projection import Distance
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from optuna_llm_catalyst.prompt_tuning.prompts import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.refining import Refinement
from optuna_llm_catalyst.prompt_tuning.stage_plan import placed
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlan
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlanner
from optuna_llm_catalyst.prompt_tuning.stage_recorder import StageRecorder
from optuna_llm_catalyst.prompt_tuning.stage_runner import Observe
from optuna_llm_catalyst.prompt_tuning.stage_runner import StageRunner
from optuna_llm_catalyst.prompt_tuning.stage_setup import ReadyStage
from optuna_llm_catalyst.prompt_tuning.stage_setup import StageSetup
from optuna_llm_catalyst.prompt_tuning.stages import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.study_ensemble import StudyEnsemble
from optuna_llm_catalyst.prompt_tuning.text_prompts import check_later_texts
from optuna_llm_catalyst.prompt_tuning.text_prompts import LaterTexts


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

#: How a text prompt is trained: each step reads a batch of texts, and too high a rate overfits.
TEXT_STAGE = GradientStage(lr=2e-3, text_lr=5e-3, batch_size=16, schedule="cosine", patience=2)
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class PromptTuningObjective:
    """An Optuna objective: suggests a restart prompt, trains from it, returns its value.

    The value is the best one of the stage on the validation split, by the metric, the restart
    itself included. The intermediate values are the best ones so far, by the optimiser's step:
    a stage keeps its best prompt, so this is what it would come to if it ended there, and what
    a pruned one comes to. On the trial it leaves what the package's other half reads: the
    trajectory, the trained prompt as an artifact, the counted passes, and what the ensemble of
    the stages so far gets wrong. Works with every sampler, pruner and storage.

    Where the model takes prompts before the texts and before the names of labels, the first
    ``n_text_prompts`` stages train both. Their text prompts are kept; later stages train the
    labels' side on cached features. The ensemble is of both. A stage that trains a text prompt is
    never pruned.

    Args:
        model: A frozen model with a task on top.
        task: Train, validation and test examples.
        space: The space of prompts, made with the model's tokenizer.
        metric: What is optimised: ``loss``, ``accuracy``, ``macro-f1``, a :class:`Metric`, or a
            function from label indices ``(n,)`` and log-probabilities ``(n, C)`` to a value that
            is better the higher it is. Equal values are compared by their losses.
        stage: What a trial does; by default ``GradientStage()``.
        make_stage: In place of ``stage``, a function from the trial to one, which may suggest
            hyperparameters such as the learning rate.
        prompt_kind: The kind of prompt that is trained.
        n_text_prompts: How many text prompts the study keeps; by default one if the model takes
            prompts on both sides, else none.
        text_stage: What a trial does that trains a text prompt, too; by default ``TEXT_STAGE``.
        later_texts: What later stages read: ``plain`` texts, ``prompted`` ones under the kept text
            prompts, or both in ``turns``.
        seed: Seed of the batches' order. The same for every trial, so that a prompt's value
            does not depend on when it is tried.
        artifact_store: Where trained prompts go; by default ``llm_catalyst_artifacts``.
        distance: How near words are found for the trajectory, ``cosine`` or ``l2``.
        n_checked_swaps: Word swaps measured, at most, for each new projection or, without
            gradients, for each new drift; 0 to save the passes.
        share_examples: Whether some misclassified validation texts may be kept on the trial,
            from where a meta-prompt may take them. How often labels are confused always is.
            Images are never kept.
        observe: Called at each evaluation of each stage, for progress bars.

    Attributes:
        metric: What is optimised.
        prompts: The trained prompts.
        data: The task's splits, encoded.
        ensemble: The ensemble of a study's stages so far.
    """

    def __init__(
        self,
        model: TaskModel,
        task: Task,
        space: PromptSpace,
        *,
        metric: str | Metric | Measure = LOSS,
        stage: Stage | None = None,
        make_stage: Callable[[BaseTrial], Stage] | None = None,
        prompt_kind: PromptKind = SOFT,
        n_text_prompts: int | None = None,
        text_stage: Stage = TEXT_STAGE,
        later_texts: LaterTexts = "plain",
        seed: int = 0,
        artifact_store: ArtifactStore | None = None,
        distance: Distance = "cosine",
        n_checked_swaps: int = 8,
        share_examples: bool = False,
        observe: Observe | None = None,
    ) -> None:
        if stage is not None and make_stage is not None:
            raise ValueError("Give `stage` or `make_stage`, not both.")
        check_later_texts(later_texts)
        if n_text_prompts is None:
            n_text_prompts = int(len(model.placement.sides) > 1)
        self.metric = as_metric(metric)
        self.space = space
        self.task = task
        self.prompts = PromptStore(artifact_store)
        self.data = EncodedTask(model, task)
        self.model = model
        self._kind = prompt_kind
        self.ensemble = StudyEnsemble(model, self.data, self.prompts)
        self._plans = StagePlanner(
            model,
            self.data,
            self.prompts,
            n_text_prompts=n_text_prompts,
            later_texts=later_texts,
            minimize=not self.metric.maximize,
        )
        common = GradientStage() if stage is None else stage
        self._setup = StageSetup(
            model,
            space,
            self._plans,
            metric=self.metric,
            kind=prompt_kind,
            make_stage=lambda trial: self._checked(make_stage(trial) if make_stage else common),
            text_stage=text_stage,
        )
        self._runner = StageRunner(
            model,
            space,
            StageRecorder(model, task, self.prompts, self.ensemble, self.metric, share_examples),
            metric=self.metric,
            seed=seed,
            distance=distance,
            n_checked_swaps=n_checked_swaps,
            observe=observe,
        )
        checks.check_parts(model, task, space, n_text_prompts)
        checks.check_shared(model, share_examples)
        checks.check_kind(model, on_both_sides(prompt_kind) if n_text_prompts else prompt_kind)
        checks.check_later_kind(prompt_kind, n_text_prompts, later_texts)
        if make_stage is None:
            self._checked(common)
        if n_text_prompts:
            self._checked(text_stage)
        for name in ("train", "validation"):
            self.data.split(name)

    def __call__(self, trial: BaseTrial) -> float:
        make_ready = self._setup.planned(trial)
        with self.model.metered() as passes:
            return self._runner.run(make_ready(passes))

    def run_batch(
        self,
        study: optuna.Study,
        n_trials: int,
        *,
        callbacks: Sequence[batches.Callback] = (),
    ) -> list[optuna.trial.FrozenTrial]:
        """Runs so many trials at once, their prompts in one expanded batch.

        In place of ``study.optimize(objective, n_trials)``: each stage comes to what it would
        come to alone, but for rounding, and the model is run less often with more at once. The
        sampler proposes all of them before any has an outcome. Only stages that go the same way
        run together, and only by gradients; others run one after the other.

        Args:
            study: The study.
            n_trials: How many trials; memory grows with it.
            callbacks: Called with the study and each trial once all are finished. Unlike those
                of ``study.optimize`` they cannot end a loop: ``study.stop`` raises.

        Returns:
            The finished trials.

        Raises:
            ValueError: If ``n_trials`` is below one.
        """
        check_at_least(1, n_trials=n_trials)
        return batches.run(study, n_trials, self._ready, self._runner, callbacks)

    def score(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study | None = None
    ) -> list[float]:
        """Values of prompts on the validation split without training, in batched passes.

        Made for ``LLMCatalystSampler(screen=objective.score)``.

        Args:
            prompts: The prompts.
            study: The study, whose next stage reads texts in its own way; by default plain ones.
        """
        if not prompts:
            return []
        start, plan = self._untrained(prompts, study)
        found = evaluate(self.model, start, plan.validation)
        return [self.metric.value(plan.validation.labels, rows) for rows in found.log_probs]

    def score_in_ensemble(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study
    ) -> list[float]:
        """Values of the study's ensemble with each prompt, untrained, as a member.

        Made for ``LLMCatalystSampler(screen=objective.score_in_ensemble)``: the best candidate is
        the one that adds most to what the stages so far know.
        """
        if not prompts:
            return []
        start, plan = self._untrained(prompts, study)
        members = self.ensemble.members(study)
        candidates = self.ensemble.candidates(start, plan.text_prompt)
        found = [self.ensemble.validation_log_probs([*members, one]) for one in candidates]
        return [self.metric.value(plan.validation.labels, rows) for rows in found]  # (n, C) each

    def test(self, trained: TrainedPrompt) -> TestScore:
        """What a trained prompt is worth on the test split.

        Raises:
            ValueError: If the task has no test split.
            CheckpointError: If the prompt was trained for other labels or another model.
        """
        if not self.task.test:
            raise ValueError("The task has no test examples: add test.jsonl to its folder.")
        prompt, split = self.data.read(placed(trained, self.model), "test")
        found = evaluate(self.model, prompt, split)
        value = self.metric.value(split.labels, found.log_probs[0])
        return TestScore(found.loss[0], found.accuracy[0], len(split), value)

    def refine(
        self, study: optuna.Study, *, n_steps: int, patience: int | None = 3
    ) -> optuna.trial.FrozenTrial:
        """Continues the best stage as one more trial: the paper's long last stage.

        The new trial has the best one's parameters, starts from its trained prompt, and has the
        origin ``refine``. A trial of that origin that Optuna runs again does so, too. The log
        says whether it helped.

        Args:
            study: A study with at least one complete stage.
            n_steps: Budget of the new stage, in the stage's own unit (optimiser steps).
            patience: Evaluations in a row without a better one after which it ends; None to
                spend the whole budget.

        Returns:
            The finished trial.

        Raises:
            ValueError: If ``patience`` is below one.
            CheckpointError: If the best stage's prompt cannot be loaded.
        """
        check_at_least(1, patience=patience)
        best = checkpoints.best_trial(study)
        self._plans.load(study, best.number)  # Before there is a trial to fail.
        refined = refining.run(self, study, best, Refinement(best.number, n_steps, patience))
        _logger.info(refining.told(study, refined))
        return refined

    def classifier(
        self, study: optuna.Study, *, k: int | None = None, fit: bool = True
    ) -> PromptClassifier:
        """The ensemble of a study's complete stages as a classifier.

        A stage whose prompt cannot be loaded is left out, and named in the log.

        Args:
            study: The study.
            k: So many of the best by the study's value; by default all.
            fit: Whether to fit it to the task's examples, where the model compares features.

        Raises:
            ValueError: If ``k`` is below one.
            CheckpointError: If no stage is complete, or none has a prompt that can be loaded.
        """
        found, is_fitted = self.ensemble.together(study, k, fit=fit)
        reads_pairs = any(example.text_pair is not None for example in self.task.train)
        return PromptClassifier(self.model, found, is_fitted=is_fitted, reads_pairs=reads_pairs)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction of the study, for ``optuna.create_study``."""
        return self.metric.direction

    def _ready(self, trial: BaseTrial) -> ReadyStage:
        """The stage of a trial, whose passes are counted until it is ready."""
        make_ready = self._setup.planned(trial)
        with self.model.metered() as passes:
            return make_ready(passes)

    def _checked(self, stage: Stage) -> Stage:
        checks.check_stage(self.model, stage, self._kind, self.task)
        return stage

    def _untrained(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study | None
    ) -> tuple[Prompt, StagePlan]:
        """What would stand before the labels in the next stage, and how that reads texts."""
        plan = self._plans.next(study, -1)
        start = self.model.start([p.token_ids for p in prompts], plan.train, self._kind)
        return start, plan
