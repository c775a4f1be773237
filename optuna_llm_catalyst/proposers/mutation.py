"""Restart prompts without an LLM: the baseline for it, and the fallback when the LLM fails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
        signal_probability: Chance that a replacement follows the trajectory's signals, where
            there are any, instead of drawing from the vocabulary.
    """

    def __init__(self, *, signal_probability: float = 0.5) -> None:
        if not 0 <= signal_probability <= 1:
            raise ValueError(f"`signal_probability` must be in [0, 1], got {signal_probability}.")
        self._signal_probability = signal_probability

    def propose(self, request: ProposalRequest) -> Proposal:
        rng = np.random.default_rng(request.seed)
        found: dict[RestartPrompt, set[int]] = {}
        for _ in range(_ATTEMPTS_PER_CANDIDATE * request.n_candidates):
            child, parents = self._child(request.space, request.history.points, rng)
            child = request.space.with_tokens(child, request.fixed)
            if child.token_ids not in request.history.tried:
                found.setdefault(child, parents)
            if len(found) == request.n_candidates:
                break
        details = {"proposer": "mutation", "parents": sorted(set().union(*found.values()))}
        return Proposal(tuple(found), "mutation", details)

    def _child(
        self, space: PromptSpace, points: Sequence[HistoryPoint], rng: np.random.Generator
    ) -> tuple[RestartPrompt, set[int]]:
        """A new prompt and the numbers of its parents."""
        if not points:
            return random_prompt(space, rng), set()
        # The probability of a parent falls linearly from the best to the worst.
        weights = np.arange(len(points), 0, -1, dtype=float)
        drawn = rng.choice(len(points), size=2, p=weights / weights.sum())
        mother, father = (points[i] for i in drawn)
        is_fathers = rng.random(space.num_virtual_tokens) < 0.5
        child = np.where(is_fathers, father.prompt.token_ids, mother.prompt.token_ids).tolist()
        for _ in range(int(rng.integers(1, 4))):
            position = int(rng.integers(len(child)))
            # Signals speak of the parent's own token at that position.
            source = mother if child[position] == mother.prompt.token_ids[position] else father
            signals = [(swap.position, swap.new) for swap in source.swaps]
            signals += [(drift.position, drift.word) for drift in source.drift]
            known = [word for at, word in signals if at == position and word in space.word_ids]
            follows = known and rng.random() < self._signal_probability
            child[position] = space.word_ids[_drawn(known if follows else space.words, rng)]
        # Pieces of words may have come together: settle on a text that stands for its tokens.
        text = space.from_token_ids(child).text
        prompt = space.from_text(text) if text.strip() else random_prompt(space, rng)
        return prompt, {mother.trial_number, father.trial_number}


def random_prompt(space: PromptSpace, rng: np.random.Generator) -> RestartPrompt:
    """As many random whole words of the vocabulary as the space has virtual tokens."""
    words = (_drawn(space.words, rng) for _ in range(space.num_virtual_tokens))
    return space.from_text(" ".join(words))


def _drawn(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
