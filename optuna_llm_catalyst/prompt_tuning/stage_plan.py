"""How a stage reads texts: the prompt before them, and the splits encoded under it."""

from __future__ import annotations

from dataclasses import dataclass

import optuna

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import text_prompts
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from optuna_llm_catalyst.prompt_tuning.prompts import both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.text_prompts import LaterTexts
from optuna_llm_catalyst.prompt_tuning.text_prompts import Reading


_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True, eq=False)
class StagePlan:
    """What a stage reads, before it has a start.

    Attributes:
        reading: How it reads texts.
        text_prompt: What stands before the texts and is not trained (``P = 1``), if anything.
        train: What it trains on, encoded under the text prompt.
        validation: What it is evaluated on, encoded in the same way.
    """

    reading: Reading
    text_prompt: Prompt | None
    train: Split
    validation: Split

    @staticmethod
    def of(data: EncodedTask, reading: Reading, text_prompt: Prompt | None = None) -> StagePlan:
        """The plan with its splits, encoded unless they were before."""
        train, validation = data.split("train", text_prompt), data.split("validation", text_prompt)
        return StagePlan(reading, text_prompt, train, validation)

    def whole(self, prompt: Prompt) -> Prompt:
        """What the stage trained together with what stands before the texts."""
        if self.text_prompt is None:
            return prompt
        return both_sides(prompt, self.text_prompt)


class StagePlanner:
    """Decides how the stages of a study read texts.

    Args:
        model: The frozen model.
        data: Its task, encoded.
        prompts: Where trained prompts are.
        n_text_prompts: How many text prompts a study keeps.
        later_texts: What stages read that train no text prompt.
        minimize: Whether a lower value is better.
    """

    def __init__(
        self,
        model: TaskModel,
        data: EncodedTask,
        prompts: PromptStore,
        *,
        n_text_prompts: int,
        later_texts: LaterTexts,
        minimize: bool,
    ) -> None:
        self._model = model
        self._data = data
        self._prompts = prompts
        self._n_text_prompts = n_text_prompts
        self._later_texts: LaterTexts = later_texts
        self._minimize = minimize

    def next(self, study: optuna.Study | None, number: int) -> StagePlan:
        """The plan of the next stage, that of the trial of a number."""
        trials = [] if study is None else records.all_trials(study)
        reading = text_prompts.choose(
            trials,
            number,
            self._n_text_prompts,
            minimize=self._minimize,
            later_texts=self._later_texts,
        )
        if study is None or reading.text_prompt is None or reading.is_trained:
            return StagePlan.of(self._data, reading)
        try:
            kept = self.load(study, reading.text_prompt)
        except CheckpointError as error:
            _logger.warning(f"Trial {number} reads plain texts: {error}")
            return StagePlan.of(self._data, Reading())
        return StagePlan.of(self._data, reading, sides(kept)[1])

    def continued(self, study: optuna.Study, number: int) -> tuple[StagePlan, Prompt]:
        """The plan and the start of a stage that goes on with that of a trial.

        Raises:
            CheckpointError: If the trained prompt of that trial cannot be used.
        """
        prompt = self.load(study, number)
        trial = next(t for t in records.all_trials(study) if t.number == number)
        record = records.load(trial, "stage", StageRecord)
        text_prompt = None if record is None else record.text_prompt
        if text_prompt == number:
            return StagePlan.of(self._data, Reading(number, is_trained=True)), prompt
        labels, texts = sides(prompt)
        return StagePlan.of(self._data, Reading(text_prompt), texts), labels

    def load(self, study: optuna.Study, number: int) -> Prompt:
        """The trained prompt of a trial on the model's device.

        Raises:
            CheckpointError: If it cannot be loaded, or is of another model or other labels.
        """
        return placed(self._prompts.load(study, number), self._model)


def placed(trained: TrainedPrompt, model: TaskModel) -> Prompt:
    """A trained prompt on a model's device.

    Raises:
        CheckpointError: If it was trained for another model or for other labels.
    """
    facts = trained.facts
    if facts.labels != tuple(model.labels):
        raise CheckpointError(
            f"the prompt was trained for the labels {', '.join(facts.labels)}, the task has "
            f"{', '.join(model.labels)}."
        )
    if facts.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"the prompt was trained on {facts.model_name!r} (fingerprint "
            f"{facts.fingerprint}), this model is {model.name!r} (fingerprint "
            f"{model.fingerprint}): use the model and the task model of its study."
        )
    prompt = trained.prompt.map(lambda tensor: tensor.to(model.device))
    expected = prompt.kind.start(model.embed([facts.token_ids]), model.placement)
    if missing := expected.keys() - prompt.tensors.keys():
        raise CheckpointError(
            f"the prompt lacks {min(missing)!r}, which a {prompt.kind.name} prompt of "
            f"{facts.model_name!r} has."
        )
    return prompt
