"""Trial to value: one stage of prompt tuning a trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.study import StudyDirection
from optuna.trial import BaseTrial
from optuna.trial import Trial
from optuna.trial import TrialState
from torch import Tensor

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import workers
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.models import counted_passes
from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.projection import Metric
from optuna_llm_catalyst.prompt_tuning.projection import Projector
from optuna_llm_catalyst.prompt_tuning.projection import word_table
from optuna_llm_catalyst.prompt_tuning.projection import WordTable
from optuna_llm_catalyst.prompt_tuning.prompts import embed
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
from optuna_llm_catalyst.trajectory import Trajectory
from optuna_llm_catalyst.trajectory import TrajectoryPoint


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

StageOrFactory = Stage | Callable[[BaseTrial], Stage]


@dataclass(frozen=True)
class TestScore:
    """Loss in nats and accuracy in [0, 1] on a split, and how many examples it has."""

    loss: float
    accuracy: float
    n_examples: int

    __test__ = False  # Not a test case, whatever pytest thinks of the name.


class PromptTuningObjective:
    """An Optuna objective: suggests a restart prompt, trains from it, returns the loss.

    The value is the lowest validation loss of the stage, the restart itself included. On the
    trial it leaves what the package's other half reads: the trajectory, the trained prompt as an
    artifact, the counted passes. Works with every sampler and in every storage.

    Args:
        model: A frozen model with a task on top.
        task: Train, validation and test examples.
        space: The space of prompts, made with the model's tokenizer.
        stage: What a trial does; or a function from the trial to it, which may suggest
            hyperparameters such as the learning rate.
        seed: Seed of the batches' order. The same for every trial, so that a prompt's value
            does not depend on when it is tried.
        artifact_store: Where trained prompts go; by default ``llm_catalyst_artifacts``.
        metric: How near words are found for the trajectory, ``cosine`` or ``l2``.
        n_checked_swaps: Word swaps measured for each new projection; 0 to save the passes.
        share_examples: Whether some misclassified validation texts may be kept on the trial,
            from where a meta-prompt may take them. How often labels are confused always is.
        observe: Called at each evaluation of each stage, for progress bars.
    """

    def __init__(
        self,
        model: TaskModel,
        task: Task,
        space: PromptSpace,
        *,
        stage: StageOrFactory | None = None,
        seed: int = 0,
        artifact_store: ArtifactStore | None = None,
        metric: Metric = "cosine",
        n_checked_swaps: int = 8,
        share_examples: bool = False,
        observe: Callable[[BaseTrial, Evaluation], None] | None = None,
    ) -> None:
        if not task.validation:
            raise ValueError(
                "`task` has no validation examples, by which stages are compared: add "
                "validation.jsonl, or draw them with `few_shot(task, shots, seed)`."
            )
        if tuple(task.labels) != tuple(model.labels):
            raise ValueError(f"`model` has the labels {model.labels}, `task` has {task.labels}.")
        if space.vocab_size > model.word_embeddings.shape[0]:
            raise ValueError(
                f"`space` has {space.vocab_size} tokens, `model` embeds "
                f"{model.word_embeddings.shape[0]}: make the space with the model's tokenizer."
            )
        if space.num_virtual_tokens > model.max_virtual_tokens:
            raise ValueError(
                f"`space` has {space.num_virtual_tokens} virtual tokens, `model` has room for "
                f"{model.max_virtual_tokens}."
            )
        self.space = space
        self.task = task
        self._model = model
        self._stage: StageOrFactory = GradientStage() if stage is None else stage
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
        workers.claim(trial)
        # A sampler that screens does so at the first suggestion: its passes are the trial's, too.
        with counted_passes(self._model) as passes:
            prompt = self.space.suggest(trial)
            stage = self._stage_of(trial)
            start = embed([prompt.token_ids], self._model.word_embeddings)[0]  # (L, d)
            return self._run(trial, stage, prompt, start, passes)

    def score(self, prompts: Sequence[RestartPrompt]) -> list[float]:
        """Validation losses of prompts without training, all in one batched pass.

        Made for ``LLMCatalystSampler(screen=objective.score)``.
        """
        if not prompts:
            return []
        embeddings = embed([p.token_ids for p in prompts], self._model.word_embeddings)
        head = self._model.fresh_head(embeddings, self._train)
        return list(evaluate(self._model, embeddings, head, self._validation).loss)

    def test(self, trained: TrainedPrompt) -> TestScore:
        """Loss and accuracy of a trained prompt on the test split.

        Raises:
            ValueError: If the task has no test split.
            CheckpointError: If the prompt was trained for other labels.
        """
        if not self.task.test:
            raise ValueError("The task has no test examples: add test.jsonl to its folder.")
        if trained.labels != tuple(self.task.labels):
            raise CheckpointError(
                f"the prompt was trained for the labels {', '.join(trained.labels)}, the task "
                f"has {', '.join(self.task.labels)}."
            )
        prompts, head = self._placed(trained)
        metrics = evaluate(self._model, prompts.unsqueeze(0), head, self._test)
        return TestScore(metrics.loss[0], metrics.accuracy[0], len(self._test))

    def refine(self, study: optuna.Study, *, n_steps: int) -> optuna.trial.FrozenTrial:
        """Continues the best stage as one more trial: the paper's long last stage.

        The new trial has the best one's parameters, starts from its trained prompt, and has the
        origin ``refine``.

        Args:
            study: A study with at least one complete stage.
            n_steps: Optimiser steps of the new stage.

        Returns:
            The finished trial.
        """
        best = checkpoints.best_trial(study)
        trained = checkpoints.load_soft_prompt(
            study, trial_number=best.number, artifact_store=self.artifact_store
        )
        start, head = self._placed(trained)
        trial = records.start_trial(
            study,
            best.params,
            best.distributions,
            {"origin": "refine", "refined_from": best.number},
        )
        try:
            workers.claim(trial)
            stage = replace(self._stage_of(trial), n_steps=n_steps)  # type: ignore[type-var]
            prompt = self.space.suggest(trial)
            with counted_passes(self._model) as passes:
                value = self._run(trial, stage, prompt, start, passes, head)
        except optuna.TrialPruned:
            return study.tell(trial, state=TrialState.PRUNED)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        return study.tell(trial, value)

    def _run(
        self,
        trial: BaseTrial,
        stage: Stage,
        prompt: RestartPrompt,
        start: Tensor,
        passes: Passes,
        head: Head | None = None,
    ) -> float:
        points: list[TrajectoryPoint] = []
        table = self._table_with(prompt.token_ids)
        projector = Projector(
            self._model,
            table,
            self._train,
            self._validation,
            start,
            metric=self._metric,
            n_checked_swaps=self._n_checked_swaps,
        )

        def observe(evaluation: Evaluation) -> bool:
            points.append(projector.point(evaluation))
            trial.report(evaluation.loss, evaluation.index)
            if self._observe is not None:
                self._observe(trial, evaluation)
            return trial.should_prune()

        result = stage.run(
            self._model,
            start,
            self._train,
            self._validation,
            head=head,
            seed=self._seed,
            observe=observe,
        )
        self._record(trial, prompt, result, points, passes)
        if result.stopped:
            raise optuna.TrialPruned(f"at step {result.n_steps}")
        return result.best.loss

    def _record(
        self,
        trial: BaseTrial,
        prompt: RestartPrompt,
        result: StageResult,
        points: Sequence[TrajectoryPoint],
        passes: Passes,
    ) -> None:
        best = result.best
        records.record_trajectory(trial, Trajectory(tuple(points)))
        if best.predictions is not None:
            records.record_mistakes(trial, self._mistakes(best.predictions.tolist()))
        attrs: dict[str, Any] = {
            "tuned_prompt": next(point.text for point in points if point.step == best.step),
            "accuracy": best.accuracy,
            "stage_steps": result.n_steps,
            "forward_passes": passes.forward,
            "backward_passes": passes.backward,
            "forward_sequences": passes.sequences,
        }
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        trained = TrainedPrompt(
            embeddings=best.prompt,
            head=best.head,
            text=prompt.text,
            token_ids=prompt.token_ids,
            model_name=self._model.name,
            labels=tuple(self.task.labels),
        )
        checkpoints.save(trial, trained, self.artifact_store)

    def _mistakes(self, predictions: Sequence[int]) -> Mistakes:
        names, examples = self.task.labels, self.task.validation
        texts = [(e.text, e.text_pair) for e in examples] if self._share_examples else []
        return Mistakes.of(
            [names[example.label] for example in examples],
            [names[index] for index in predictions],
            texts,
        )

    def _stage_of(self, trial: BaseTrial) -> Stage:
        return self._stage(trial) if callable(self._stage) else self._stage

    def _placed(self, trained: TrainedPrompt) -> tuple[Tensor, Head]:
        """A trained prompt (L, d) and its head, on the model's device."""
        device = self._model.word_embeddings.device
        names = {trained.model_name, self._model.name} - {""}
        if len(names) > 1:
            raise CheckpointError(
                f"the prompt was trained on {trained.model_name!r}, this model is "
                f"{self._model.name!r}."
            )
        width = self._model.word_embeddings.shape[1]
        if trained.embeddings.shape[1] != width:
            raise CheckpointError(
                f"the prompt was trained on {trained.model_name!r} with embeddings of width "
                f"{trained.embeddings.shape[1]}, this model has {width}."
            )
        head = {name: rows.to(device) for name, rows in trained.head.items()}
        return trained.embeddings.to(device), head

    def _table_with(self, token_ids: Sequence[int]) -> WordTable:
        """The table of whole words, and for this stage the start's own tokens besides."""
        if all(token_id in self.space.whole_words for token_id in token_ids):
            return self._table
        return word_table(self.space, self._model.word_embeddings, also=token_ids)

    @cached_property
    def _table(self) -> WordTable:
        return word_table(self.space, self._model.word_embeddings)

    @cached_property
    def _test(self) -> EncodedSplit:
        return self._model.encode(self.task.test)

    @cached_property
    def artifact_store(self) -> ArtifactStore:
        """Where trained prompts go."""
        if self._store is None:
            return checkpoints.folder_store(checkpoints.DEFAULT_FOLDER)
        return self._store


def _check_direction(trial: BaseTrial) -> None:
    if isinstance(trial, Trial) and trial.study.direction != StudyDirection.MINIMIZE:
        raise ValueError(
            "PromptTuningObjective returns a validation loss, but the study maximizes: create "
            "it with direction='minimize'."
        )
