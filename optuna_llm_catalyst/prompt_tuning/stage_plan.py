"""How a stage reads texts: the prompt before them, and the splits encoded under it."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.text_prompts import Reading


TWO_SIDED = TwoSidedPrompt()


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
        return Prompt(TWO_SIDED, {**prompt.tensors, "texts": self.text_prompt.tensors["texts"]})
