"""Trial to value: one stage of prompt tuning a trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.study import StudyDirection
from optuna.trial import BaseTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import stage_records
from optuna_llm_catalyst.prompt_tuning import text_prompts
from optuna_llm_catalyst.prompt_tuning import workers
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.ensemble import averaged
from optuna_llm_catalyst.prompt_tuning.ensemble import grouped
from optuna_llm_catalyst.prompt_tuning.ensemble import member_trials
from optuna_llm_catalyst.prompt_tuning.ensemble import PromptEnsemble
from optuna_llm_catalyst.prompt_tuning.fitted import fit_groups
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.projection import Metric
from optuna_llm_catalyst.prompt_tuning.projection import Projector
from optuna_llm_catalyst.prompt_tuning.projection import word_table
from optuna_llm_catalyst.prompt_tuning.projection import WordTable
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlan
from optuna_llm_catalyst.prompt_tuning.stage_plan import TWO_SIDED
from optuna_llm_catalyst.prompt_tuning.stage_recorder import StageRecorder
from optuna_llm_catalyst.prompt_tuning.stage_records import Refinement
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.study_ensemble import StudyEnsemble
from optuna_llm_catalyst.prompt_tuning.text_prompts import Reading
from optuna_llm_catalyst.trajectory import Trajectory
from optuna_llm_catalyst.trajectory import TrajectoryPoint


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

#: How a text prompt is trained: each step reads a batch of texts, and too high a rate overfits.
TEXT_STAGE = GradientStage(lr=2e-3, text_lr=5e-3, batch_size=16, schedule="cosine")
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True)
class TestScore:
    """Loss in nats and accuracy in [0, 1] on a split, and how many examples it has."""

    loss: float
    accuracy: float
    n_examples: int

    __test__ = False  # Not a test case, whatever pytest thinks of the name.


class PromptTuningObjective:
    """An Optuna objective: suggests a restart prompt, trains from it, returns the loss.

    The value is the lowest validation loss of the stage, the restart itself included. The
    intermediate values are the lowest loss so far, by the optimiser's step: a stage keeps its
    best prompt, so this is what it would come to if it ended there, and what a pruned one comes
    to. On the trial it leaves what the package's other half reads: the trajectory, the trained
    prompt as an artifact, the counted passes, and what the ensemble of the stages so far gets
    wrong. Works with every sampler, pruner and storage.

    Where the model takes prompts before the texts and before the names of labels, the first
    ``n_text_prompts`` stages train both. Their text prompts are kept: later stages train the
    labels' side on features under these and of the plain texts, in turns.

    Args:
        model: A frozen model with a task on top.
        task: Train, validation and test examples.
        space: The space of prompts, made with the model's tokenizer.
        stage: What a trial does; by default ``GradientStage()``.
        make_stage: In place of ``stage``, a function from the trial to one, which may suggest
            hyperparameters such as the learning rate.
        prompt_kind: The kind of prompt that is trained.
        n_text_prompts: How many text prompts the study keeps; by default one if the model takes
            prompts on both sides, else none.
        text_stage: What a trial does that trains a text prompt, too; by default ``TEXT_STAGE``.
        mix_plain: Whether later stages read plain texts, too, or prompted ones only.
        seed: Seed of the batches' order. The same for every trial, so that a prompt's value
            does not depend on when it is tried.
        artifact_store: Where trained prompts go; by default ``llm_catalyst_artifacts``.
        metric: How near words are found for the trajectory, ``cosine`` or ``l2``.
        n_checked_swaps: Word swaps measured for each new projection; 0 to save the passes.
        share_examples: Whether some misclassified validation texts may be kept on the trial,
            from where a meta-prompt may take them. How often labels are confused always is.
        observe: Called at each evaluation of each stage, for progress bars.

    Attributes:
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
        stage: Stage | None = None,
        make_stage: Callable[[BaseTrial], Stage] | None = None,
        prompt_kind: PromptKind = SOFT,
        n_text_prompts: int | None = None,
        text_stage: Stage = TEXT_STAGE,
        mix_plain: bool = True,
        seed: int = 0,
        artifact_store: ArtifactStore | None = None,
        metric: Metric = "cosine",
        n_checked_swaps: int = 8,
        share_examples: bool = False,
        observe: Callable[[BaseTrial, Evaluation], None] | None = None,
    ) -> None:
        if stage is not None and make_stage is not None:
            raise ValueError("Give `stage` or `make_stage`, not both.")
        has_sides = len(model.placement.sides) > 1
        self.space = space
        self.task = task
        self.prompts = PromptStore(artifact_store)
        self.data = EncodedTask(model, task)
        self._model = model
        self._stage: Stage = GradientStage() if stage is None else stage
        self._make_stage = make_stage
        self._kind = prompt_kind
        self._n_text_prompts = int(has_sides) if n_text_prompts is None else n_text_prompts
        self._text_stage = text_stage
        self._mix_plain = mix_plain
        self._seed = seed
        self._metric: Metric = metric
        self._n_checked_swaps = n_checked_swaps
        self._observe = observe
        self.ensemble = StudyEnsemble(model, self.data, self.prompts)
        self._recorder = StageRecorder(model, task, self.prompts, self.ensemble, share_examples)
        _check_parts(model, task, space, self._n_text_prompts)
        for name in ("train", "validation"):
            self.data.split(name)

    def __call__(self, trial: BaseTrial) -> float:
        _check_direction(trial)
        stage_records.check_model(trial, self._model)
        workers.claim(trial)
        study = trial.study if isinstance(trial, Trial) else None
        refinement = records.load(trial, "refinement", Refinement) if study else None
        # Splits are encoded once for all stages: that is no stage's cost.
        if refinement is not None and study is not None:
            plan = self._continued(study, refinement.refined_from)
        else:
            plan = self._next(study, trial.number)
        # A sampler that screens does so at the first suggestion: its passes are the trial's, too.
        with self._model.metered() as passes:
            prompt = self.space.suggest(trial)
            stage = self._stage_of(trial, plan.reading)
            if refinement is not None and study is not None:
                stage = stage.with_budget(refinement.budget)
                start = self._placed(self.prompts.load(study, refinement.refined_from))
                start = start if plan.text_prompt is None else sides(start)[0]
            else:
                kind = TWO_SIDED if plan.reading.is_trained else self._kind
                start = self._model.start([prompt.token_ids], plan.train, kind)
            text_prompt = plan.reading.text_prompt
            refined_from = None if refinement is None else refinement.refined_from
            stage_records.record_stage(trial, stage, self._model, text_prompt, refined_from)
            return self._run(trial, stage, prompt, start, plan, passes)

    def score(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study | None = None
    ) -> list[float]:
        """Validation losses of prompts without training, in batched passes.

        Made for ``LLMCatalystSampler(screen=objective.score)``.

        Args:
            prompts: The prompts.
            study: The study, whose next stage reads texts in its own way; by default plain ones.
        """
        if not prompts:
            return []
        start, plan = self._untrained(prompts, study)
        return list(evaluate(self._model, start, plan.validation).loss)

    def score_in_ensemble(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study
    ) -> list[float]:
        """Validation losses of the study's ensemble with each prompt, untrained, as a member.

        Made for ``LLMCatalystSampler(screen=objective.score_in_ensemble)``: the best candidate is
        the one that adds most to what the stages so far know.
        """
        if not prompts:
            return []
        start, plan = self._untrained(prompts, study)
        members = self.ensemble.members(study)
        candidates = self.ensemble.candidates(start, plan.text_prompt)
        return [self.ensemble.validation_loss([*members, one]) for one in candidates]

    def test(self, trained: TrainedPrompt) -> TestScore:
        """Loss and accuracy of a trained prompt on the test split.

        Raises:
            ValueError: If the task has no test split.
            CheckpointError: If the prompt was trained for other labels or another model.
        """
        if not self.task.test:
            raise ValueError("The task has no test examples: add test.jsonl to its folder.")
        prompt, split = self.data.read(self._placed(trained), "test")
        metrics = evaluate(self._model, prompt, split)
        return TestScore(metrics.loss[0], metrics.accuracy[0], len(split))

    def refine(self, study: optuna.Study, *, n_steps: int) -> optuna.trial.FrozenTrial:
        """Continues the best stage as one more trial: the paper's long last stage.

        The new trial has the best one's parameters, starts from its trained prompt, and has the
        origin ``refine``. A trial of that origin that Optuna runs again does so, too.

        Args:
            study: A study with at least one complete stage.
            n_steps: Budget of the new stage, in the stage's own unit (optimiser steps).

        Returns:
            The finished trial.

        Raises:
            CheckpointError: If the best stage's prompt cannot be loaded.
        """
        best = checkpoints.best_trial(study)
        self._placed(self.prompts.load(study, best.number))  # Before there is a trial to fail.
        trial = records.start_trial(
            study,
            best.params,
            best.distributions,
            {"origin": "refine", "refined_from": best.number},
        )
        try:
            continued = {"refined_from": best.number, "budget": n_steps}
            records.save(trial, "refinement", continued)
            value = self(trial)
        except optuna.TrialPruned:
            return study.tell(trial, state=TrialState.PRUNED)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        return study.tell(trial, value)

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
        numbers = {trial.number for trial in member_trials(study, k)}
        members = [m for m in self.ensemble.members(study) if m.number in numbers]
        if not members:
            raise CheckpointError(f"study {study.study_name!r} has no stage that can be loaded.")
        groups = averaged(grouped(members), self._model)
        has_fit = fit and any(group.readout is not None for group in groups)
        found = PromptEnsemble(
            fit_groups(groups, self.data) if has_fit else groups,
            tuple(self.task.labels),
            self._model.name,
            self._model.fingerprint,
        )
        reads_pairs = any(example.text_pair is not None for example in self.task.train)
        return PromptClassifier(self._model, found, is_fitted=has_fit, reads_pairs=reads_pairs)

    @property
    def stage_settings(self) -> dict[str, Any]:
        """What makes the values of two stages comparable; empty if each trial has its own."""
        return {} if self._make_stage else stage_records.settings_of(self._stage, self._model)

    def _stage_of(self, trial: BaseTrial, reading: Reading) -> Stage:
        if reading.is_trained:
            return self._text_stage
        return self._stage if self._make_stage is None else self._make_stage(trial)

    def _next(self, study: optuna.Study | None, number: int) -> StagePlan:
        """How the next stage reads texts, that of the trial of a number."""
        trials = [] if study is None else records.all_trials(study)
        reading = text_prompts.choose(
            trials, number, self._n_text_prompts, mix_plain=self._mix_plain
        )
        if study is None or reading.text_prompt is None or reading.is_trained:
            return StagePlan.of(self.data, reading)
        try:
            kept = self._placed(self.prompts.load(study, reading.text_prompt))
        except CheckpointError as error:
            _logger.warning(f"Trial {number} reads plain texts: {error}")
            return StagePlan.of(self.data, Reading())
        return StagePlan.of(self.data, reading, sides(kept)[1])

    def _untrained(
        self, prompts: Sequence[RestartPrompt], study: optuna.Study | None
    ) -> tuple[Prompt, StagePlan]:
        """What would stand before the labels in the next stage, and how that reads texts."""
        plan = self._next(study, -1)
        start = self._model.start([p.token_ids for p in prompts], plan.train, self._kind)
        return start, plan

    def _continued(self, study: optuna.Study, number: int) -> StagePlan:
        """How the stage reads texts that goes on with that of a trial."""
        prompt = self._placed(self.prompts.load(study, number))
        trial = next(t for t in records.all_trials(study) if t.number == number)
        record = records.load(trial, "stage", StageRecord)
        text_prompt = None if record is None else record.text_prompt
        if text_prompt == number:
            return StagePlan.of(self.data, Reading(number, is_trained=True))
        return StagePlan.of(self.data, Reading(text_prompt), sides(prompt)[1])

    def _run(
        self,
        trial: BaseTrial,
        stage: Stage,
        prompt: RestartPrompt,
        start: Prompt,
        plan: StagePlan,
        passes: Passes,
    ) -> float:
        points: dict[int, TrajectoryPoint] = {}
        lowest = math.inf

        def observe(evaluation: Evaluation) -> bool:
            nonlocal lowest
            lowest = min(lowest, evaluation.loss)  # What is not a number is never lower.
            if evaluation.step not in points:
                trial.report(lowest if math.isfinite(lowest) else math.nan, evaluation.step)
            if evaluation.step not in points or evaluation.loss <= lowest:
                points[evaluation.step] = projector.point(evaluation)
            if self._observe is not None:
                self._observe(trial, evaluation)
            # An untrained prompt says nothing of where its stage will end.
            return evaluation.step > 0 and trial.should_prune()

        run = Run(self._model, start, plan.train, plan.validation, self._seed, observe)
        projector = Projector(
            # Words are measured before the labels alone: before texts they would be dear.
            replace(run, start=sides(start)[0]),
            self._table_with(prompt.token_ids),
            metric=self._metric,
            n_checked_swaps=self._n_checked_swaps,
        )
        result = stage.run(run)
        if result.best.step not in points:  # A stage need not show its best.
            points[result.best.step] = projector.point(result.best)
        trajectory = Trajectory(tuple(points[step] for step in sorted(points)))
        self._recorder.record(trial, prompt, plan, result, trajectory, passes)
        if result.stopped:
            raise optuna.TrialPruned(f"at step {result.spent}")
        return result.best.loss

    def _placed(self, trained: TrainedPrompt) -> Prompt:
        """A trained prompt on the model's device, if it is one of this model and this task."""
        facts = trained.facts
        if facts.labels != tuple(self.task.labels):
            raise CheckpointError(
                f"the prompt was trained for the labels {', '.join(facts.labels)}, the task has "
                f"{', '.join(self.task.labels)}."
            )
        if facts.fingerprint != self._model.fingerprint:
            raise CheckpointError(
                f"the prompt was trained on {facts.model_name!r} (fingerprint "
                f"{facts.fingerprint}), this model is {self._model.name!r} (fingerprint "
                f"{self._model.fingerprint}): use the model and the task model of its study."
            )
        return trained.prompt.map(lambda tensor: tensor.to(self._model.device))

    def _table_with(self, token_ids: Sequence[int]) -> WordTable:
        """The table of whole words, and for this stage the start's own tokens besides."""
        if all(token_id in self.space.whole_words for token_id in token_ids):
            return self._table
        return word_table(self.space, self._model.embed, also=token_ids)

    @cached_property
    def _table(self) -> WordTable:
        return word_table(self.space, self._model.embed)


def _check_parts(model: TaskModel, task: Task, space: PromptSpace, n_text_prompts: int) -> None:
    """Raises if model, task and space do not belong together."""
    if not task.validation:
        raise ValueError(
            "`task` has no validation examples, by which stages are compared: draw them with "
            "`draw_splits(task, seed)` or `few_shot(task, shots, seed)`."
        )
    if tuple(task.labels) != tuple(model.labels):
        raise ValueError(f"`model` has the labels {model.labels}, `task` has {task.labels}.")
    if space.vocab_size > model.vocab_size:
        raise ValueError(
            f"`space` has {space.vocab_size} tokens, `model` embeds {model.vocab_size}: make the "
            "space with the model's tokenizer."
        )
    if space.num_virtual_tokens > model.placement.max_virtual_tokens:
        raise ValueError(
            f"`space` has {space.num_virtual_tokens} virtual tokens, `model` has room for "
            f"{model.placement.max_virtual_tokens}."
        )
    check_at_least(0, n_text_prompts=n_text_prompts)
    if n_text_prompts and len(model.placement.sides) < 2:
        raise ValueError(
            f"`n_text_prompts` is {n_text_prompts}, but {type(model).__name__} takes prompts "
            f"before its {model.placement.sides[0]} only: leave it at 0."
        )
    room = min(model.placement.room.values(), default=space.num_virtual_tokens)
    if n_text_prompts and space.num_virtual_tokens > room:
        raise ValueError(
            f"`space` has {space.num_virtual_tokens} virtual tokens, `model` keeps room for "
            f"{room} before a text: raise its `max_virtual_tokens`, or take `n_text_prompts=0`."
        )


def _check_direction(trial: BaseTrial) -> None:
    if isinstance(trial, Trial) and trial.study.direction != StudyDirection.MINIMIZE:
        raise ValueError(
            "PromptTuningObjective returns a validation loss, but the study maximizes: create "
            "it with direction='minimize'."
        )
