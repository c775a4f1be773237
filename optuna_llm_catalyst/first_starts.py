"""What a study starts from where there is no proposal: prompts of the user, templates, words."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import zlib

import numpy as np

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers.mutation import random_prompt


#: A prompt, and the origin of the trial that starts from it.
Start = tuple[RestartPrompt, str]

#: A first prompt gets a second chance after a crash, not a third.
_MAX_FAILURES = 2


@dataclass(frozen=True)
class FirstStarts:
    """Chooses first starts. Its fields follow from arguments of the sampler.

    Attributes:
        space: The prompts' space.
        startup_prompts: The user's own, which come before everything else.
        templates: Prompts that name the task. Where there are none, random words take their place.
        n_startup_trials: Stages before the first proposal.
        seed: With the trial's number, the seed of everything random.
    """

    space: PromptSpace
    startup_prompts: Sequence[RestartPrompt]
    templates: Sequence[RestartPrompt]
    n_startup_trials: int
    seed: int | None

    def due(
        self, past: History, number: int, fixed: Mapping[int, int], *, n_known: int
    ) -> list[Start]:
        """What a trial may start from, the preferred start first; empty if a proposal is due.

        Args:
            past: The study so far.
            number: The trial.
            fixed: Token ids by position that every prompt has.
            n_known: How many stages count as done.
        """
        own = self._left(self.startup_prompts, past, fixed)
        templates = self.templates_left(past, number, fixed)
        is_used_up = self.templates and not templates
        if not own and (n_known >= self.n_startup_trials or is_used_up):
            return []
        return [
            *((prompt, "startup") for prompt in own),
            *((prompt, "template") for prompt in templates),
            (self.random(number, fixed), "startup"),
        ]

    def templates_left(
        self, past: History, number: int, fixed: Mapping[int, int]
    ) -> list[RestartPrompt]:
        """The templates that nobody tried or tries, in an order of the trial's own."""
        left = self._left(self.templates, past, fixed)
        rng = np.random.default_rng(seed_sequence(self.seed, number, "template"))
        return [left[i] for i in rng.permutation(len(left))]

    def random(self, number: int, fixed: Mapping[int, int]) -> RestartPrompt:
        """Random whole words of the vocabulary."""
        rng = np.random.default_rng(seed_sequence(self.seed, number, "startup"))
        return self.space.with_tokens(random_prompt(self.space, rng), fixed)

    def _left(
        self, prompts: Sequence[RestartPrompt], past: History, fixed: Mapping[int, int]
    ) -> list[RestartPrompt]:
        """The prompts, with the fixed tokens, that nobody tried or tries."""
        untried = (prompt for prompt in prompts if prompt.token_ids not in past.tried)
        return [
            prompt
            for prompt in dict.fromkeys(self.space.with_tokens(p, fixed) for p in untried)
            if prompt.token_ids not in past.tried
            and past.failures.get(prompt.token_ids, 0) < _MAX_FAILURES
        ]


def seed_sequence(seed: int | None, trial_number: int, purpose: str) -> np.random.SeedSequence:
    """The seeds of one trial for one purpose; with ``seed`` None fresh ones each time."""
    if seed is None:
        return np.random.SeedSequence()
    return np.random.SeedSequence([seed, trial_number, zlib.crc32(purpose.encode())])
