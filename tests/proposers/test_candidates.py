from __future__ import annotations

from dataclasses import replace
from functools import cache
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.mutation import random_prompt
from optuna_llm_catalyst.proposers.reply import has_words
from optuna_llm_catalyst.proposers.reply import judge
from optuna_llm_catalyst.providers import Completion
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.tokenizer_zoo import ZOO
from tests.toy_stage import reply as reply_of
from tests.toy_stage import word_space
from tests.toy_stage import WordTokenizer


SPACE = word_space(3)
HISTORY = history_of(SPACE, [("calm answer quick", 0.1)], in_flight=["meadow gold"])
REQUEST = request_of(SPACE, HISTORY)
TRIED = "it was tried before"
UNKNOWN = "no word of it is in the vocabulary"
NO_WORDS = "it needs two common words and little else"
ECHO = "it repeats the example of the form"


@pytest.mark.parametrize(
    ("texts", "prompts", "rejected"),
    [
        (["silver river"], ["silver river a"], []),
        (["calm answer quick"], [], [("calm answer quick", TRIED)]),
        (["calm  answer\tquick"], [], [("calm answer quick", TRIED)]),
        (["meadow gold", "metal gold"], ["metal gold a"], [("meadow gold", TRIED)]),
        (["qqq zzz"], [], [("qqq zzz", UNKNOWN)]),
        (["qqq metal gold"], ["metal gold a"], []),
        (["metal", "a metal a", "a a a"], [], [("metal", NO_WORDS)]),
        (["..."], [], [("...", ECHO)]),
        (
            ["silver river stone glass gold"],
            ["silver river stone"],
            [("silver river stone glass gold", "it is 2 tokens too long")],
        ),
        (["calm answer quick glass"], [], [("calm answer quick glass", TRIED)]),
        (
            ["silver river stone glass", "metal gold"],
            ["metal gold a", "silver river stone"],
            [("silver river stone glass", "it is 1 tokens too long")],
        ),
        (["metal gold", "metal gold a", "metal gold"], ["metal gold a"], []),
        (
            ["silver river stone glass", "silver river stone"],
            ["silver river stone"],
            [("silver river stone glass", "it is 1 tokens too long")],
        ),
    ],
)
def test_texts_become_prompts_or_are_rejected_with_a_reason(
    texts: list[str], prompts: list[str], rejected: list[tuple[str, str]]
) -> None:
    judged = judge(Completion(reply_of(*texts), "m"), REQUEST)
    assert list(judged.rejected)[: len(rejected)] == rejected
    assert [p.text for p in judged.usable + judged.too_long] == prompts
    proposer = LLMProposer(ReplayProvider([reply_of(*texts)]), max_attempts=1)
    if prompts:
        proposal = proposer.propose(REQUEST)
        assert [p.text for p in proposal.prompts] == prompts
        (attempt,) = proposal.details["attempts"]
    else:
        with pytest.raises(ProposalError, match=rejected[0][1]) as caught:
            proposer.propose(REQUEST)
        (attempt,) = caught.value.details["attempts"]
    assert attempt["rejected"] == [list(pair) for pair in judged.rejected]


PIECES = st.lists(st.sampled_from(["calm", "answer", "quick", "meadow", "qqq"]), max_size=5)


@given(rows=st.lists(PIECES.map(" ".join), max_size=6))
def test_no_text_of_a_reply_is_lost(rows: list[str]) -> None:
    """Each is usable, too long, or rejected with a reason."""
    judged = judge(Completion(reply_of(*rows), "m"), REQUEST)
    assert all(p.n_truncated == 0 for p in judged.usable)
    assert all(p.n_truncated > 0 for p in judged.too_long)
    found = [p.token_ids for p in judged.usable], [p.token_ids for p in judged.too_long]
    assert all(len(set(ids)) == len(ids) for ids in found)
    assert REQUEST.history.tried.isdisjoint(found[0] + found[1])
    assert bool(judged.usable) is (judged.problem == "")
    unused = {text for text, _ in judged.rejected}
    for text in filter(None, rows):
        prompt_ids = SPACE.from_text(text).token_ids if set(text.split()) - {"qqq"} else ()
        assert (prompt_ids in found[0] and text not in unused) or text in unused


@cache
def space_of(name: str, length: int) -> PromptSpace:
    return PromptSpace(ZOO[name](), length)


# Words.


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("Which topic is this message about?", True),
        ("sort by intent: billing or delivery", True),
        ("top 5 reasons for a refund", True),
        ("1.236", False),
        ("4. 5. 6. 7.", False),
        ("...", False),
        ("?!", False),
        ("A. B. C. D.", False),
        ("a a a", False),
        ("message", False),
        ("message 1.236", False),
        ("ask why 12 345 67", False),
        ("日 本 語", True),
        ("### ### ###", False),
    ],
)
def test_a_candidate_is_made_of_words(text: str, accepted: bool) -> None:
    request = request_of(space_of("word piece", 8))
    assert bool(judge(Completion(reply_of(text), "m"), request).usable) is accepted


@pytest.mark.parametrize(
    ("words", "length", "text", "accepted"),
    [
        pytest.param(["a", "calm", "topic"], 1, "calm", True, id="room for one word"),
        pytest.param(["a", "calm", "topic"], 2, "calm", False, id="room for two words"),
        pytest.param(["1", "2", "3"], 3, "1 2", True, id="no words in the vocabulary"),
    ],
)
def test_a_small_space_needs_fewer_words(
    words: list[str], length: int, text: str, accepted: bool
) -> None:
    space = PromptSpace(WordTokenizer(words), length, padding=words[-1])
    assert bool(judge(Completion(reply_of(text), "m"), request_of(space)).usable) is accepted


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize(
    "text", [*reply.EXAMPLES, reply.EXAMPLES[0].title() + "!", "...", "…", ". . ."]
)
def test_a_copy_of_the_example_is_rejected(text: str, length: int) -> None:
    space = space_of("word piece", length)
    (shown, *_) = reply.examples(4, length)
    for copied in (text, " ".join(text.split()[:length]), shown):
        judged = judge(Completion(reply_of(copied), "m"), request_of(space))
        assert judged.rejected == ((one_line(copied), ECHO),)


# The pattern for servers that hold a model to it.


@pytest.mark.parametrize("length", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_pattern_matches_random_prompts_that_are_accepted(
    name: str, length: int, seed: int
) -> None:
    space = space_of(name, length)
    prompt = random_prompt(space, np.random.default_rng(seed))
    matches = re.compile(reply.pattern(space)).search(one_line(prompt.text)) is not None
    assert matches or not has_words(prompt, space)
    if name in ("two methods", "word piece"):
        assert has_words(prompt, space)


def spelled(*words: str, length: int = 8) -> str:
    return reply.pattern(word_space(length, ["a", *words]))


@pytest.mark.parametrize(
    "text",
    ["1.236", "4. 5. 6. 7.", "...", "", " calm answer", "calm", "z" * 30 + " calm", "calm\nanswer"]
    + ["a b c d e f g h i", "calm  answer", "calm answer."],
)
def test_the_pattern_refuses_what_is_no_prompt(text: str) -> None:
    assert re.compile(spelled("calm", "answer")).search("don't answer it is not calm")
    assert not re.compile(spelled("calm", "answer")).search(text)


@pytest.mark.parametrize(
    ("words", "letters"),
    [
        (("calm", "answer"), "A-Za-z"),
        (("für", "größe", "Öl", "kalt"), "A-Za-zÖßöü"),
        (("мир", "ответ", "вопрос"), "A-Za-zвеимо-т"),
    ],
)
def test_the_letters_of_the_pattern_are_those_of_the_vocabulary(
    words: tuple[str, ...], letters: str
) -> None:
    character_class = re.match(r"\^\[(.*?)\]", spelled(*words))
    assert character_class
    used = re.compile(f"[{character_class[1]}]")
    assert all(used.match(c) for c in "".join(words))
    assert not any(used.match(c) for c in "0 .,:'\"-?\n[]{}ж")
    assert character_class[1] == letters


SCATTERED = [chr(code) for code in range(0x4E00, 0x9F00, 7)]
MANY = [chr(code) for code in range(0x4E00, 0x4E00 + 6_000)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(SCATTERED, id="a script of many letters"),
        pytest.param(["calm", "answer", *SCATTERED], id="several scripts"),
        pytest.param(["calm", "answer", *MANY], id="many letters, each of them rare"),
        pytest.param(["1", "2", "..."], id="no words"),
    ],
)
def test_there_is_no_pattern_where_it_would_be_long(words: list[str]) -> None:
    space = PromptSpace(WordTokenizer(words), 3, padding=words[0])
    assert reply.pattern(space) == ""
    assert "pattern" not in reply.schema(2, "")["properties"]["prompts"]["items"]


# Fixed tokens.


@given(
    fixed=st.dictionaries(st.integers(0, 2), st.integers(1, 80), max_size=3),
    rows=st.lists(PIECES.map(" ".join), max_size=6),
)
def test_fixed_tokens_stand_in_every_candidate(fixed: dict[int, int], rows: list[str]) -> None:
    judged = judge(Completion(reply_of(*rows), "m"), replace(REQUEST, fixed=fixed))
    prompts = judged.usable + judged.too_long
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert all(prompt.token_ids[i] == token_id for i, token_id in fixed.items())
        assert prompt.text == SPACE.from_token_ids(prompt.token_ids).text
        assert prompt.token_ids not in HISTORY.tried


def test_candidates_that_differ_in_fixed_tokens_only_are_one() -> None:
    fixed = {0: SPACE.word_ids["calm"]}
    completion = Completion(reply_of("silver river stone", "velvet river stone"), "m")
    judged = judge(completion, replace(REQUEST, fixed=fixed))
    assert [prompt.text for prompt in judged.usable] == ["calm river stone"]
    tried = replace(REQUEST, fixed={**fixed, 1: SPACE.word_ids["answer"]})
    judged = judge(Completion(reply_of("silver river quick"), "m"), tried)
    assert judged.rejected == (("silver river quick", TRIED),)
