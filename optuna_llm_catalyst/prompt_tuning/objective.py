"""Trial to value: one stage of prompt tuning a trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
import math
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.study import StudyDirection
from optuna.trial import BaseTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import stage_records
from optuna_llm_catalyst.prompt_tuning import workers
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.projection import Metric
from optuna_llm_catalyst.prompt_tuning.projection import Projector
from optuna_llm_catalyst.prompt_tuning.projection import word_table
from optuna_llm_catalyst.prompt_tuning.projection import WordTable
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stage_records import Refinement
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
from optuna_llm_catalyst.trajectory import Trajectory
from optuna_llm_catalyst.trajectory import TrajectoryPoint


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

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
    prompt as an artifact, the counted passes. Works with every sampler, pruner and storage.

    Args:
        model: A frozen model with a task on top.
        task: Train, validation and test examples.
        space: The space of prompts, made with the model's tokenizer.
        stage: What a trial does; by default ``GradientStage()``.
        make_stage: In place of ``stage``, a function from the trial to one, which may suggest
            hyperparameters such as the learning rate.
        prompt_kind: The kind of prompt that is trained.
        seed: Seed of the batches' order. The same for every trial, so that a prompt's value
            does not depend on when it is tried.
        artifact_store: Where trained prompts go; by default ``llm_catalyst_artifacts``.
        metric: How near words are found for the trajectory, ``cosine`` or ``l2``.
        n_checked_swaps: Word swaps measured for each new projection; 0 to save the passes.
        share_examples: Whether some misclassified validation texts may be kept on the trial,
            from where a meta-prompt may take them. How often labels are confused always is.
        observe: Called at each evaluation of each stage, for progress bars.

    Attributes:
        unsaved: Trained prompts that could not be stored, by the number of their trial.
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
        seed: int = 0,
        artifact_store: ArtifactStore | None = None,
        metric: Metric = "cosine",
        n_checked_swaps: int = 8,
        share_examples: bool = False,
        observe: Callable[[BaseTrial, Evaluation], None] | None = None,
    ) -> None:
        _check_parts(model, task, space)
        if stage is not None and make_stage is not None:
            raise ValueError("Give `stage` or `make_stage`, not both.")
        self.space = space
        self.task = task
        self.unsaved: dict[int, TrainedPrompt] = {}
        self._model = model
        self._stage: Stage = GradientStage() if stage is None else stage
        self._make_stage = make_stage
        self._kind = prompt_kind
        self._seed = seed
        self._store = artifact_store
        self._metric: Metric = metric
        self._n_checked_swaps = n_checked_swaps
        self._share_examples = share_examples
        self._observe = observe
        self._train = model.encode(task.train)
        self._validation = model.encode(task.validation)

    def __call__(self, trial: BaseTrial) -> float:
        _check_direction(trial)
        stage_records.check_model(trial, self._model)
        workers.claim(trial)
        # A sampler that screens does so at the first suggestion: its passes are the trial's, too.
        with self._model.metered() as passes:
            prompt = self.space.suggest(trial)
            stage = self._stage if self._make_stage is None else self._make_stage(trial)
            refinement = records.load(trial, "refinement", Refinement)
            if refinement is not None and isinstance(trial, Trial):
                stage = stage.with_budget(refinement.budget)
                start = self._placed(self.trained(trial.study, refinement.refined_from))
            else:
                start = self._model.start([prompt.token_ids], self._train, self._kind)
            stage_records.record_stage(trial, stage, self._model)
            return self._run(trial, stage, prompt, start, passes)

    def score(self, prompts: Sequence[RestartPrompt]) -> list[float]:
        """Validation losses of prompts without training, in batched passes.

        Made for ``LLMCatalystSampler(screen=objective.score)``.
        """
        if not prompts:
            return []
        starts = self._model.start([p.token_ids for p in prompts], self._train, self._kind)
        return list(evaluate(self._model, starts, self._validation).loss)

    def test(self, trained: TrainedPrompt) -> TestScore:
        """Loss and accuracy of a trained prompt on the test split.

        Raises:
            ValueError: If the task has no test split.
            CheckpointError: If the prompt was trained for other labels or another model.
        """
        if not self.task.test:
            raise ValueError("The task has no test examples: add test.jsonl to its folder.")
        metrics = evaluate(self._model, self._placed(trained), self._test)
        return TestScore(metrics.loss[0], metrics.accuracy[0], len(self._test))

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
        self._placed(self.trained(study, best.number))  # Before there is a trial to fail.
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

    def check_storage(self) -> None:
        """Checks that trained prompts can be stored, before a stage is spent on one.

        Raises:
            CheckpointError: If the artifact store or the temporary folder cannot be written.
        """
        checkpoints.check_writable(self.artifact_store)

    def trained(self, study: optuna.Study, number: int) -> TrainedPrompt:
        """The trained prompt of a stage, from memory if it could not be stored.

        Raises:
            CheckpointError: If neither memory nor the artifact store has it.
        """
        if number in self.unsaved:
            return self.unsaved[number]
        return checkpoints.load_soft_prompt(
            study, trial_number=number, artifact_store=self.artifact_store
        )

    def save_unsaved(self, folder: str | Path) -> list[Path]:
        """Writes the prompts that could not be stored to files of a folder, and returns these.

        Raises:
            CheckpointError: If they cannot be written there, either.
        """
        paths = []
        for number, trained in self.unsaved.items():
            paths.append(Path(folder) / f"soft_prompt_of_stage_{number}.safetensors")
            checkpoints.write(trained, paths[-1])
        return paths

    @property
    def stage_settings(self) -> dict[str, Any]:
        """What makes the values of two stages comparable; empty if each trial has its own."""
        return {} if self._make_stage else stage_records.settings_of(self._stage, self._model)

    @cached_property
    def artifact_store(self) -> ArtifactStore:
        """Where trained prompts go."""
        if self._store is None:
            return checkpoints.folder_store(checkpoints.DEFAULT_FOLDER)
        return self._store

    def _run(
        self, trial: BaseTrial, stage: Stage, prompt: RestartPrompt, start: Prompt, passes: Passes
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

        run = Run(self._model, start, self._train, self._validation, self._seed, observe)
        projector = Projector(
            run,
            self._table_with(prompt.token_ids),
            metric=self._metric,
            n_checked_swaps=self._n_checked_swaps,
        )
        result = stage.run(run)
        if result.best.step not in points:  # A stage need not show its best.
            points[result.best.step] = projector.point(result.best)
        self._record(trial, prompt, result, points, passes)
        if result.stopped:
            raise optuna.TrialPruned(f"at step {result.spent}")
        return result.best.loss

    def _record(
        self,
        trial: BaseTrial,
        prompt: RestartPrompt,
        result: StageResult,
        points: Mapping[int, TrajectoryPoint],
        passes: Passes,
    ) -> None:
        best = result.best
        records.record_trajectory(
            trial, Trajectory(tuple(points[step] for step in sorted(points)))
        )
        if best.predictions is not None:
            records.record_mistakes(trial, self._mistakes(best.predictions.tolist()))
        attrs: dict[str, Any] = {
            "tuned_prompt": points[best.step].text,
            "accuracy": best.accuracy,
            "stage_steps": result.spent,
            "forward_passes": passes.forward,
            "backward_passes": passes.backward,
            "forward_sequences": passes.sequences,
        }
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        facts = PromptFacts(
            prompt.text,
            prompt.token_ids,
            tuple(self.task.labels),
            self._model.name,
            self._model.fingerprint,
        )
        self._save(trial, TrainedPrompt(best.prompt, facts))

    def _save(self, trial: BaseTrial, trained: TrainedPrompt) -> None:
        """Stores a trained prompt, or keeps it in memory: a full disk costs no stage."""
        try:
            checkpoints.save(trial, trained, self.artifact_store)
        except CheckpointError as error:
            self.unsaved[trial.number] = trained
            _logger.error(f"{error}. It is kept in memory only, until this process ends.")

    def _mistakes(self, predictions: Sequence[int]) -> Mistakes:
        names, examples = self.task.labels, self.task.validation
        texts = [(e.text, e.text_pair) for e in examples] if self._share_examples else []
        return Mistakes.of(
            [names[example.label] for example in examples],
            [names[index] for index in predictions],
            texts,
        )

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

    @cached_property
    def _test(self) -> Split:
        return self._model.encode(self.task.test)


def _check_parts(model: TaskModel, task: Task, space: PromptSpace) -> None:
    """Raises if model, task and space do not belong together."""
    if not task.validation:
        raise ValueError(
            "`task` has no validation examples, by which stages are compared: add "
            "validation.jsonl, or draw them with `few_shot(task, shots, seed)`."
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


def _check_direction(trial: BaseTrial) -> None:
    if isinstance(trial, Trial) and trial.study.direction != StudyDirection.MINIMIZE:
        raise ValueError(
            "PromptTuningObjective returns a validation loss, but the study maximizes: create "
            "it with direction='minimize'."
        )
