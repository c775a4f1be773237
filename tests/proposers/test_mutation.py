from __future__ import annotations

from collections.abc import Sequence
import copy
from dataclasses import replace
import pickle
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import DriftWord
from optuna_llm_catalyst import MutationProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import HistoryPoint
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.toy_stage import texts
from tests.toy_stage import word_space


SPACE = word_space(3)
HISTORY = history_of(SPACE, [(text, i / 10) for i, text in enumerate(texts(5))])


@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 6), empty=st.booleans())
def test_the_same_seed_gives_the_same_proposal(seed: int, n: int, empty: bool) -> None:
    history = History() if empty else HISTORY
    request = request_of(SPACE, history, n_candidates=n, seed=seed)
    first = MutationProposer().propose(request)
    for proposer in (MutationProposer(), pickle.loads(pickle.dumps(MutationProposer()))):
        again = proposer.propose(copy.deepcopy(request))
        assert [p.token_ids for p in again.prompts] == [p.token_ids for p in first.prompts]
        assert again.details == first.details
    assert first.origin == "mutation"
    assert first.details["proposer"] == "mutation"


@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 6))
def test_candidates_are_new_and_differ(seed: int, n: int) -> None:
    prompts = (
        MutationProposer().propose(request_of(SPACE, HISTORY, n_candidates=n, seed=seed)).prompts
    )
    assert len(prompts) == n
    assert len({p.token_ids for p in prompts}) == n
    assert HISTORY.tried.isdisjoint(p.token_ids for p in prompts)
    assert all(SPACE.from_text(p.text) == p for p in prompts)


def test_seeds_make_a_difference() -> None:
    proposals = [
        MutationProposer().propose(request_of(SPACE, HISTORY, seed=seed)).prompts
        for seed in range(5)
    ]
    assert len(set(proposals)) == 5


@given(
    seed=st.integers(0, 2**31 - 1),
    fixed=st.dictionaries(st.integers(0, 2), st.integers(0, 80), max_size=3),
    empty=st.booleans(),
)
def test_fixed_tokens_stand_in_every_child(seed: int, fixed: dict[int, int], empty: bool) -> None:
    request = request_of(SPACE, History() if empty else HISTORY, seed=seed)
    prompts = MutationProposer().propose(replace(request, fixed=fixed)).prompts
    assert len({p.token_ids for p in prompts}) == len(prompts) == (1 if len(fixed) == 3 else 4)
    for prompt in prompts:
        assert all(prompt.token_ids[i] == token_id for i, token_id in fixed.items())
        assert prompt.text == SPACE.from_token_ids(prompt.token_ids).text


@given(seed=st.integers(0, 2**31 - 1))
def test_a_child_keeps_words_of_its_parents(seed: int) -> None:
    space = word_space(8)
    history = history_of(space, [(text, 0.1) for text in texts(2, num_virtual_tokens=8)])
    words = set(" ".join(p.prompt.text for p in history.points).split())
    proposal = MutationProposer().propose(request_of(space, history, seed=seed))
    for prompt in proposal.prompts:
        assert len(words & set(prompt.text.split())) >= 8 - 3
    assert set(proposal.details["parents"]) <= {0, 1}


def test_better_prompts_are_parents_more_often() -> None:
    parents = [
        parent
        for seed in range(200)
        for parent in MutationProposer()
        .propose(request_of(SPACE, HISTORY, n_candidates=1, seed=seed))
        .details["parents"]
    ]
    assert parents.count(0) > 2 * parents.count(4) > 0


def test_a_proposal_follows_only_the_signals_if_told_so() -> None:
    swaps = (Swap(0, "calm", "violet", -0.2, -0.1),)
    drift = (DriftWord(1, "velvet", 0.5), DriftWord(2, "willow", 0.4))
    prompt = SPACE.from_text("calm answer quick")
    point = HistoryPoint(prompt, "stage", 0, 0.1, swaps=swaps, drift=drift)
    history = History(points=(point,), tried=frozenset({prompt.token_ids}))
    seen = set()
    for seed in range(20):
        request = request_of(SPACE, history, seed=seed)
        for child in MutationProposer(signal_probability=1.0).propose(request).prompts:
            for old, new, word in zip(
                prompt.text.split(),
                ("violet", "velvet", "willow"),
                child.text.split(),
                strict=True,
            ):
                assert word in (old, new)
                seen.add(word)
    assert seen == {"calm", "answer", "quick", "violet", "velvet", "willow"}
    request = request_of(SPACE, history, n_candidates=50)
    blind = MutationProposer(signal_probability=0.0).propose(request).prompts
    words = {word for child in blind for word in child.text.split()}
    assert len(words - seen) > 20


def test_a_tiny_vocabulary_gives_what_is_left_of_it() -> None:
    space = word_space(1, words=["a", "calm", "topic", "quick"])
    history = history_of(space, [("calm", 0.1), ("topic", 0.2)])
    for seed in range(5):
        left = MutationProposer().propose(request_of(space, history, seed=seed)).prompts
        assert [p.text for p in left] == ["quick"]
    history = replace(history, tried=frozenset((i,) for i in range(4)))
    assert MutationProposer().propose(request_of(space, history)).prompts == ()


def test_a_parent_without_a_word_does_not_stop_it() -> None:
    """Samplers that draw token ids also draw those that stand for nothing."""
    space = word_space(2, words=["a", "", "calm", "topic", "quick"])
    wordless = space.from_token_ids([1, 1])
    assert wordless.text.split() == []
    history = History(
        points=(HistoryPoint(wordless, "stage", 0, 0.1),), tried=frozenset({wordless.token_ids})
    )
    for seed in range(5):
        assert MutationProposer().propose(request_of(space, history, seed=seed)).prompts


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_that_is_none_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=rf"`signal_probability` .* \[0, 1\], got {probability}"):
        MutationProposer(signal_probability=probability)


def test_a_signal_is_followed_at_the_position_of_its_token() -> None:
    # Of the first word there are two tokens: positions of words are not positions of tokens.
    space = PromptSpace(PieceTokenizer(), 3, padding="calm")
    prompt = space.from_text("answers topic")
    assert prompt.text == "answers topic" and len(set(prompt.token_ids)) == 3
    swap = Swap(2, "topic", "river", -0.1, -0.1)
    point = HistoryPoint(prompt, "stage", 0, 0.5, swaps=(swap,))
    history = History(points=(point,), tried=frozenset({prompt.token_ids}))
    request = request_of(space, history, n_candidates=40)
    found = {p.text for p in MutationProposer(signal_probability=1).propose(request).prompts}
    assert "answers river" in found


class PieceTokenizer:
    """Words, and the ending "s" as a piece of its own."""

    words = ("calm", "answer", "topic", "river", "stone", "##s")
    vocab_size = len(words)

    def encode(self, text: str) -> list[int]:
        pieces = re.sub(r"(\w)s\b", r"\1 ##s", text).split()
        return [self.words.index(piece) for piece in pieces if piece in self.words]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in token_ids).replace(" ##", "")
