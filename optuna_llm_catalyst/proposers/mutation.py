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

    A child takes each token from one of two parents drawn by rank (uniform crossover), then one
    to three of them are replaced: by a swap that was measured to help its parent, by a word
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
            child = request.space.with_tokens(child, request.fixed)
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
        child = _crossover(mother.prompt.token_ids, father.prompt.token_ids, rng)
        for _ in range(int(rng.integers(1, 4))):
            position = int(rng.integers(len(child)))
            # Signals speak of the parent's own token at that position.
            source = mother if child[position] == mother.prompt.token_ids[position] else father
            child[position] = self._replacement(space, source, position, rng)
        # Pieces of words may have come together: settle on a text that stands for its tokens.
        text = space.from_token_ids(child).text
        prompt = space.from_text(text) if text.strip() else random_prompt(space, rng)
        return prompt, {mother.trial_number, father.trial_number}

    def _replacement(
        self, space: PromptSpace, parent: HistoryPoint, position: int, rng: np.random.Generator
    ) -> int:
        words = [swap.new for swap in parent.swaps if swap.position == position]
        words += [drift.word for drift in parent.drift if drift.position == position]
        signals = [space.word_ids[word] for word in words if word in space.word_ids]
        if signals and rng.random() < self._signal_probability:
            return signals[int(rng.integers(len(signals)))]
        return space.word_ids[_random_word(space, rng)]


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


def _crossover(
    mother: Sequence[int], father: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """Each token from the father with probability one half."""
    takes = rng.random(len(mother)) < 0.5
    return [f if take else m for m, f, take in zip(mother, father, takes, strict=True)]
