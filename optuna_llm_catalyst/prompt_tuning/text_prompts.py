"""Which prompt stands before the texts in a stage: none, one that it trains, or a kept one.

A study's first stages train a prompt on both sides. The best of their text prompts are kept.
Later stages train the labels' side alone, on cached features: of the plain texts, under a kept
text prompt, or both in turns. The ensemble then has groups that read texts in different ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args
from typing import Literal

from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord


_MARK = "trains_text_prompt"
#: What stages read that train no text prompt.
LaterTexts = Literal["plain", "turns", "prompted"]


@dataclass(frozen=True)
class Reading:
    """How a stage reads texts.

    Attributes:
        text_prompt: The number of the trial that trained the prompt before the texts; None for
            plain texts.
        is_trained: Whether this stage is that trial.
    """

    text_prompt: int | None = None
    is_trained: bool = False

    def __str__(self) -> str:
        if self.is_trained:
            return "trained here"
        return "none" if self.text_prompt is None else f"of stage {self.text_prompt}"


def mark(trial: BaseTrial) -> None:
    """Says on a running trial that it trains a text prompt, before it has a start.

    A proposal may take minutes, in which other workers would train one, too.
    """
    records.save(trial, _MARK, True)


def check_later_texts(later_texts: str) -> None:
    """Raises a ValueError unless it is one of ``LaterTexts``."""
    if later_texts not in get_args(LaterTexts):
        raise ValueError(
            f"`later_texts` must be 'plain', 'turns' or 'prompted', got {later_texts!r}."
        )


def choose(
    trials: Sequence[FrozenTrial],
    number: int,
    n_text_prompts: int,
    *,
    minimize: bool = True,
    later_texts: LaterTexts = "plain",
) -> Reading:
    """How the trial of a number reads texts, by what the study's other trials do.

    Where a text prompt is still being trained by another worker, the stage reads plain texts.

    Args:
        trials: The trials of the study.
        number: The number of the trial that starts.
        n_text_prompts: How many text prompts the study keeps.
        minimize: Whether a lower value is better.
        later_texts: What stages read that train no text prompt.
    """
    n_members: dict[int | None, int] = {None: 0}
    trained: list[tuple[float, int]] = []
    n_training = 0
    for trial in trials:
        is_running = trial.state == TrialState.RUNNING
        record = records.load(trial, "stage", StageRecord)
        if trial.number == number:
            continue
        if record is None:
            n_training += is_running and bool(records.load(trial, _MARK, bool))
            continue
        if trial.state not in records.FINISHED and not is_running:
            continue
        n_members[record.text_prompt] = n_members.get(record.text_prompt, 0) + 1
        if record.text_prompt == trial.number and record.refined_from is None:
            n_training += is_running
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                trained.append((trial.value if minimize else -trial.value, trial.number))
    if len(trained) + n_training < n_text_prompts:
        return Reading(number, is_trained=True)
    kept = [number for _, number in sorted(trained)[:n_text_prompts]]
    # The least used of them; the best text prompt among equals.
    choices: list[int | None] = [] if later_texts == "plain" else [*kept]
    if later_texts != "prompted" or not kept:
        choices.append(None)
    return Reading(min(choices, key=lambda choice: n_members.get(choice, 0)))
