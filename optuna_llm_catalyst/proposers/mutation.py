"""Restart prompts without an LLM: recombine and mutate what worked.

Baseline for the LLM and the fallback when it is silent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers.base import Proposal
from optuna_llm_catalyst.proposers.base import ProposalRequest


_ATTEMPTS_PER_CANDIDATE = 20


class MutationProposer:
    """Proposes children of the best prompts.

    A child takes each word from one of two parents drawn by rank (uniform crossover), then one
    to three of its words are replaced: by a swap that was measured to help its parent, by a word
    towards which training moved that position, or by any whole word of the vocabulary.

    Args:
        signal_probability:
            Chance that a replacement follows the trajectory's signals, where there are any,
            instead of drawing from the vocabulary.
    """

    def __init__(self, *, signal_probability: float = 0.5) -> None:
        if not 0 <= signal_probability <= 1:
            raise ValueError(f"`signal_probability` must be in [0, 1], got {signal_probability}.")
        self._signal_probability = signal_probability

    def propose(self, request: ProposalRequest) -> Proposal:
        rng = np.random.default_rng(request.seed)
        found: dict[tuple[int, ...], RestartPrompt] = {}
        parents: set[int] = set()
        for _ in range(_ATTEMPTS_PER_CANDIDATE * request.n_candidates):
            if len(found) == request.n_candidates:
                break
            child, numbers = self._child(request.space, request.history, rng)
            if child.token_ids not in request.history.tried and child.token_ids not in found:
                found[child.token_ids] = child
                parents |= numbers
        details = {"proposer": "mutation", "parents": sorted(parents)}
        return Proposal(tuple(found.values()), "mutation", details)

    def _child(
        self, space: PromptSpace, history: History, rng: np.random.Generator
    ) -> tuple[RestartPrompt, set[int]]:
        if not history.points:
            return random_prompt(space, rng), set()
        mother, father = (_draw_by_rank(history.points, rng) for _ in range(2))
        words = _crossover(mother.prompt.text.split(), father.prompt.text.split(), rng)
        if not words:  # Random token ids can be blanks only.
            return random_prompt(space, rng), set()
        for _ in range(int(rng.integers(1, 4))):
            position = int(rng.integers(len(words)))
            words[position] = self._replacement(space, mother, position, rng)
        # The words are capped by the length of their parents; a longer one is cut at L tokens.
        return space.from_text(" ".join(words)), {mother.trial_number, father.trial_number}

    def _replacement(
        self, space: PromptSpace, parent: HistoryPoint, position: int, rng: np.random.Generator
    ) -> str:
        signals = [s.new for s in parent.swaps if s.position == position]
        signals += [d.word for d in parent.drift if d.position == position]
        if signals and rng.random() < self._signal_probability:
            return str(signals[int(rng.integers(len(signals)))])
        return _random_word(space, rng)


def random_prompt(space: PromptSpace, rng: np.random.Generator) -> RestartPrompt:
    """As many random whole words of the vocabulary as the space has virtual tokens."""
    words = [_random_word(space, rng) for _ in range(space.num_virtual_tokens)]
    return space.from_text(" ".join(words))


def _random_word(space: PromptSpace, rng: np.random.Generator) -> str:
    return space.words[int(rng.integers(len(space.words)))]


def _draw_by_rank(points: Sequence[HistoryPoint], rng: np.random.Generator) -> HistoryPoint:
    """A point drawn with probability falling linearly from the best to the worst."""
    weights = np.arange(len(points), 0, -1, dtype=float)
    return points[int(rng.choice(len(points), p=weights / weights.sum()))]


def _crossover(mother: list[str], father: list[str], rng: np.random.Generator) -> list[str]:
    """Each word from the father with probability one half, where he has one there."""
    takes = rng.random(len(mother)) < 0.5
    return [
        father[i] if take and i < len(father) else word
        for i, (word, take) in enumerate(zip(mother, takes, strict=True))
    ]
