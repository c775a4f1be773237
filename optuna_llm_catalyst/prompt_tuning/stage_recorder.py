"""What a stage leaves on its trial."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

from optuna.trial import BaseTrial
from optuna.trial import Trial
import torch

from optuna_llm_catalyst import records
from optuna_llm_catalyst.mistakes import EnsembleRecord
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.metrics import ACCURACY
from optuna_llm_catalyst.prompt_tuning.metrics import LOSS
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlan
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
from optuna_llm_catalyst.prompt_tuning.study_ensemble import StudyEnsemble
from optuna_llm_catalyst.trajectory import Trajectory


class StageRecorder:
    """Writes the results of stages.

    Args:
        model: The frozen model.
        task: Its task.
        prompts: Where trained prompts go.
        ensemble: The ensemble that each complete stage joins.
        metric: What the value of a stage is.
        share_examples: Whether misread texts may be kept on trials.
    """

    def __init__(
        self,
        model: TaskModel,
        task: Task,
        prompts: PromptStore,
        ensemble: StudyEnsemble,
        metric: Metric,
        share_examples: bool,
    ) -> None:
        self._model = model
        self._task = task
        self._prompts = prompts
        self._ensemble = ensemble
        self._metric = metric
        self._share_examples = share_examples

    def record(
        self,
        trial: BaseTrial,
        prompt: RestartPrompt,
        plan: StagePlan,
        result: StageResult,
        trajectory: Trajectory,
        passes: Passes,
        *,
        is_pruned: bool,
    ) -> None:
        """Leaves on a trial what its stage came to, and its trained prompt in the store."""
        best = result.best
        trained = TrainedPrompt(plan.whole(best.prompt), self._facts(prompt))
        records.record_trajectory(trial, trajectory)
        if best.predictions is not None:
            records.record_mistakes(trial, self._mistakes(best.predictions.tolist()))
        if isinstance(trial, Trial) and not is_pruned and math.isfinite(best.value):
            self._record_ensemble(trial, trained.prompt)
        tuned = next(point.text for point in trajectory.points if point.step == best.step)
        attrs: dict[str, Any] = {
            "tuned_prompt": tuned,
            "text_prompt": str(plan.reading),
            "accuracy": best.accuracy,
            "loss": best.loss,
            "stage_steps": result.spent,
            "forward_passes": passes.forward,
            "backward_passes": passes.backward,
            "forward_sequences": passes.sequences,
        }
        for key, value in attrs.items():
            if value == value:  # JSON knows no NaN.
                trial.set_user_attr(key, value)
        self._prompts.save(trial, trained)

    def _record_ensemble(self, trial: Trial, trained: Prompt) -> None:
        """Leaves on a trial how good the ensemble is with its stage, and what it gets wrong."""
        stage = records.load(trial, "stage", StageRecord)
        replaced = (trial.number, None if stage is None else stage.refined_from)
        others = [m for m in self._ensemble.members(trial.study) if m.number not in replaced]
        members = [*others, self._ensemble.keep(trial.study, trial.number, trained)]
        log_probs = self._ensemble.validation_log_probs(members).cpu()  # (n, C)
        labels = torch.tensor([example.label for example in self._task.validation])
        record = EnsembleRecord(
            n_members=len(members),
            loss=LOSS.value(labels, log_probs),
            accuracy=ACCURACY.value(labels, log_probs),
            mistakes=self._mistakes(log_probs.argmax(-1).tolist()),
            value=self._metric.value(labels, log_probs),
        )
        records.record_ensemble(trial, record)
        trial.set_user_attr("ensemble_accuracy", record.accuracy)

    def _facts(self, prompt: RestartPrompt) -> PromptFacts:
        return PromptFacts(
            prompt.text,
            prompt.token_ids,
            tuple(self._task.labels),
            self._model.name,
            self._model.fingerprint,
        )

    def _mistakes(self, predictions: Sequence[int]) -> Mistakes:
        names, examples = self._task.labels, self._task.validation
        texts = [(e.text, e.text_pair) for e in examples] if self._share_examples else []
        return Mistakes.of(
            [names[example.label] for example in examples],
            [names[index] for index in predictions],
            texts,
        )
