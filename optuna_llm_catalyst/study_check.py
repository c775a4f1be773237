"""Whether the trials of a study were made in a space of prompts."""

from __future__ import annotations

from collections.abc import Iterable

from optuna.trial import FrozenTrial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.prompt_space import NAME_PREFIX
from optuna_llm_catalyst.prompt_space import PromptSpace


def check_trials(space: PromptSpace, trials: Iterable[FrozenTrial]) -> None:
    """Checks that trials were made with this tokenizer and this number of virtual tokens.

    Raises:
        StudyMismatchError: If they were not. The message names the trial and the difference.
    """
    for trial in trials:
        names = [name for name in trial.distributions if name.startswith(NAME_PREFIX)]
        # A trial that died between two suggestions has some of the names only.
        if trial.state in records.FINISHED and names and set(names) != set(space.param_names):
            raise StudyMismatchError(
                f"Trial {trial.number} has a prompt of {len(names)} virtual tokens, this "
                f"space {space.num_virtual_tokens}. Use the same number, or a new study name."
            )
        sizes = {getattr(trial.distributions[name], "high", -1) + 1 for name in names}
        other_sizes = sizes - {space.vocab_size}
        if other_sizes:
            raise StudyMismatchError(
                f"Trial {trial.number} was made with a vocabulary of {other_sizes.pop()} "
                f"tokens, this tokenizer has {space.vocab_size}. Use the model of the study, "
                "or a new study name."
            )
        token_ids = space.find(trial.params)
        text = records.load(trial, "prompt", str)
        if token_ids is None or text is None:
            continue
        read = space.from_token_ids(token_ids).text
        if read != text:
            raise StudyMismatchError(
                f"Trial {trial.number} started from {text!r}, which this tokenizer reads as "
                f"{read!r}. Use the model of the study, or a new study name."
            )
