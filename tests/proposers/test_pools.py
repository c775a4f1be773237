from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.proposers.llm import edit_record
from optuna_llm_catalyst.proposers.llm import n_edits
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.toy_stage import reply
from tests.toy_stage import word_space


SPACE = word_space(5)
HISTORY = history_of(SPACE, [("calm answer quick", 0.1), ("silver river stone", 0.5)])
TEXTS = st.lists(st.sampled_from("abc"), max_size=6).map(tuple)


@cache
def slow(old: tuple[str, ...], new: tuple[str, ...]) -> int:
    """The definition of the edit distance, without a table."""
    if not old or not new:
        return len(old) + len(new)
    replaced = slow(old[1:], new[1:]) + (old[0] != new[0])
    return min(replaced, slow(old[1:], new) + 1, slow(old, new[1:]) + 1)


@given(old=TEXTS, new=TEXTS)
def test_edits_are_those_of_the_definition(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    assert n_edits(old, new) == slow(old, new) == n_edits(new, old)
    assert (n_edits(old, new) == 0) is (old == new)


@pytest.mark.parametrize(
    ("texts", "edits", "over"),
    [
        (["calm answer metal", "gold glass ocean water", "gold glass iron"], [1, 4, 3], []),
        (["gold glass ocean water", "calm answer metal", "gold glass iron"], [4, 1, 3], [0]),
    ],
)
def test_only_a_refining_candidate_beyond_the_budget_is_flagged(
    texts: list[str], edits: list[int], over: list[int]
) -> None:
    prompts = [SPACE.from_text(text) for text in texts]
    request = request_of(SPACE, HISTORY, n_candidates=3)
    # Two stages of four: the budget of five words has shrunk to three.
    record = edit_record(request, 4, prompts)
    assert record == {"edit_budget": 3, "edits": edits, "over_budget": over}


def test_without_a_stage_there_is_nothing_to_be_far_from() -> None:
    prompts = [SPACE.from_text("calm")]
    assert edit_record(request_of(SPACE, History()), 4, prompts) == {}


def test_the_record_has_edits_where_the_llm_was_told() -> None:
    request = request_of(SPACE, HISTORY, n_candidates=1)
    for sections in (("pools",), ()):
        provider = ReplayProvider([reply("calm answer metal")] * 9)
        details = LLMProposer(provider, sections=sections).propose(request).details
        assert details.get("edits") == ([1] if sections else None)
