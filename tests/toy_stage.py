"""A stage without a model: words for tokens, arithmetic for training. Quick and repeatable."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import optuna

from optuna_llm_catalyst import DriftWord
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import record_trajectory
from optuna_llm_catalyst import RestartPrompt
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst import Trajectory
from optuna_llm_catalyst import TrajectoryPoint


REPOSITORY = Path(__file__).parents[1]

WORDS = (
    "a amber answer bread calm carry clear cloud copper dance deep early earth feather field "
    "final flame forest garden gentle glass gold grain green harbor heavy honest iron island "
    "judge kind label lake light maple market meadow metal minor morning narrow night north "
    "ocean olive open paper pearl pilot plain proud quick quiet rapid river round sand sharp "
    "silver simple smoke soft south spring steady stone storm sugar summer swift table thunder "
    "topic valley velvet violet warm water west willow winter wonder yellow young"
).split()


class WordTokenizer:
    """The least that a prompt space accepts: two methods and a size. Unknown words are lost."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.words = tuple(words)
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split() if word in self._ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in token_ids)


def word_space(num_virtual_tokens: int = 3, words: Sequence[str] = WORDS) -> PromptSpace:
    return PromptSpace(WordTokenizer(words), num_virtual_tokens)


def texts(n: int, *, num_virtual_tokens: int = 3, start: int = 1) -> list[str]:
    """As many prompts, no word of which is in another."""
    flat = WORDS[start : start + n * num_virtual_tokens]
    assert len(flat) == n * num_virtual_tokens
    return [" ".join(flat[i::n]) for i in range(n)]


def reply(*prompts: str) -> str:
    """An LLM's reply as it should be."""
    return json.dumps({"prompts": prompts})


def loss(prompt: RestartPrompt) -> float:
    """Untrained loss: any smooth function that tells prompts apart."""
    return 1 + sum(math.sin(0.37 * i * (k + 1)) for k, i in enumerate(prompt.token_ids, 1)) / 4


class ToyObjective:
    """One stage: halves the loss of its restart prompt, if the learning rate is right."""

    def __init__(self, space: PromptSpace) -> None:
        self.space = space

    def __call__(self, trial: optuna.Trial) -> float:
        prompt = self.space.suggest(trial)
        rate = trial.suggest_float("learning_rate", 1e-4, 1.0, log=True)
        before = loss(prompt)
        after = before / 2 + abs(math.log10(rate) + 2) / 100
        trial.report(before, step=0)
        trial.report(after, step=1)
        swap = Swap(0, prompt.text.split()[0], WORDS[1 + trial.number % 20], -0.1, -0.05)
        drift = DriftWord(1, WORDS[30 + trial.number % 20], 0.5)
        points = [
            TrajectoryPoint(step, tuple(prompt.text.split()), value, swaps=(swap,), drift=(drift,))
            for step, value in enumerate((before, after))
        ]
        record_trajectory(trial, Trajectory(tuple(points)))
        if trial.should_prune():
            raise optuna.TrialPruned
        return after


def told(study: optuna.Study) -> list[tuple[Any, ...]]:
    """What a study is about, without the times at which it happened."""
    return [
        (
            t.number,
            t.state.name,
            t.params,
            t.values,
            t.user_attrs["prompt"],
            t.user_attrs["origin"],
        )
        for t in study.get_trials(deepcopy=False)
    ]


def run_python(code: str, *options: str, env: Mapping[str, str] | None = None) -> str:
    """What a fresh interpreter prints that runs ``code`` at the root of the repository."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        check=False,
        cwd=REPOSITORY,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
