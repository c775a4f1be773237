"""Directions against the slow obvious way, and against effects that were planted."""

from __future__ import annotations

from collections.abc import Sequence
import copy
import math
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import Outcome
from optuna_llm_catalyst.history import TokenIds
from optuna_llm_catalyst.proposers import directions
from tests.toy_stage import word_space


WORDS = "a calm answer quick topic silver".split()
SPACE = word_space(3, WORDS)
#: The space's whole words: "a" is none, it is padding.
WHOLE = dict(enumerate(WORDS)) | {0: ""}

TOKENS = st.integers(0, len(WORDS) - 1)
# Sixteenths add up without rounding, and six digits tell them apart.
VALUES = st.integers(-160, 160).map(lambda i: i / 16)
OUTCOMES = st.lists(st.tuples(st.tuples(TOKENS, TOKENS, TOKENS), VALUES), max_size=12).map(
    lambda rows: [Outcome(i, ids, value) for i, (ids, value) in enumerate(rows)]
)


def outcomes_of(*rows: tuple[str, float]) -> list[Outcome]:
    """Stages by text, oldest first."""
    return [
        Outcome(i, SPACE.from_text(text).token_ids, value) for i, (text, value) in enumerate(rows)
    ]


def near(sentence: str, value: float) -> bool:
    """Whether a sentence tells this number, with its sign."""
    numbers = re.findall(r"[+-]\d+\.\d+|\b\d+\.\d{3}", sentence)
    return any(abs(float(number) - value) <= 0.0005 + 1e-9 for number in numbers)


# Oracles.


def slow_replacements(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], float]:
    changes: list[tuple[str, str, float]] = []
    for i, old in enumerate(outcomes):
        for new in outcomes[i + 1 :]:
            pairs = list(zip(old.token_ids, new.token_ids, strict=True))
            changed = [(a, b) for a, b in pairs if a != b]
            if len(changed) == 1 and all(WHOLE[token] for token in changed[0]):
                a, b = changed[0]
                changes.append((WHOLE[a], WHOLE[b], new.value - old.value))
    found = {}
    for a, b, _ in changes:
        if (b, a) not in found:
            there = [change for *words, change in changes if words == [a, b]]
            back = [-change for *words, change in changes if words == [b, a]]
            found[a, b] = sum(there + back) / len(there + back)
    return found


@settings(max_examples=200)
@given(outcomes=OUTCOMES)
def test_replacements_are_those_of_the_slow_obvious_way(outcomes: list[Outcome]) -> None:
    found = slow_replacements(outcomes)
    facts = directions.replacements(outcomes, SPACE, "loss")
    assert len(facts) == min(4, len(found))
    told = [re.findall(r'"(\w+)"', fact) for fact in facts]
    changes = [found[old, new] for old, new in told]
    assert len({tuple(pair) for pair in told}) == len(told)
    assert all(near(fact, change) for fact, change in zip(facts, changes, strict=True))
    sizes = [abs(change) for change in changes]
    assert sizes == pytest.approx(sorted(map(abs, found.values()), reverse=True)[:4])


def slow_words(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, int, int]]:
    found = {}
    for token, word in WHOLE.items():
        having = [o.value for o in outcomes if token in o.token_ids]
        lacking = [o.value for o in outcomes if token not in o.token_ids]
        if word and len(having) >= 2 and len(lacking) >= 2:
            change = sum(having) / len(having) - sum(lacking) / len(lacking)
            found[word] = change, len(having), len(lacking)
    return found


@settings(max_examples=200)
@given(outcomes=OUTCOMES)
def test_words_are_those_of_the_slow_obvious_way(outcomes: list[Outcome]) -> None:
    found = slow_words(outcomes)
    facts = directions.words(outcomes, SPACE, "loss")
    assert len(facts) == min(4, len(found))
    told = [found[re.findall(r'"(\w+)"', fact)[0]] for fact in facts]
    for fact, (change, n_having, n_lacking) in zip(facts, told, strict=True):
        assert near(fact, change)
        assert f"{n_having} with" in fact
        assert f"{n_lacking} without" in fact
    sizes = sorted((abs(change) for change, *_ in found.values()), reverse=True)[:4]
    assert [abs(change) for change, *_ in told] == pytest.approx(sizes)


def slow_size(token_ids: TokenIds) -> int:
    return len(" ".join(WORDS[i] for i in token_ids).removesuffix(" a").removesuffix(" a").split())


@settings(max_examples=200)
@given(outcomes=OUTCOMES)
def test_length_is_that_of_the_slow_obvious_way(outcomes: list[Outcome]) -> None:
    facts = directions.length(outcomes, SPACE, "loss")
    # A prompt of padding alone uses none of its tokens.
    sizes = [0 if not any(o.token_ids) else slow_size(o.token_ids) for o in outcomes]
    middle = (min(sizes) + max(sizes)) / 2 if sizes else 0
    short = [o.value for o, n in zip(outcomes, sizes, strict=True) if n <= middle]
    long = [o.value for o, n in zip(outcomes, sizes, strict=True) if n > middle]
    if len(short) < 2 or len(long) < 2:
        assert facts == []
        return
    (fact,) = facts
    assert f"over {middle:g} tokens" in fact
    assert f"({len(long)} and {len(short)} prompts)" in fact
    means = [float(number) for number in re.findall(r"-?\d+\.\d{3}", fact)]
    expected = [sum(long) / len(long), sum(short) / len(short)]
    assert means == pytest.approx(expected, abs=0.00051)


@settings(max_examples=200)
@given(outcomes=OUTCOMES, minimize=st.booleans())
def test_standstill_is_that_of_the_slow_obvious_way(
    outcomes: list[Outcome], minimize: bool
) -> None:
    facts = directions.standstill(History(outcomes=tuple(outcomes), minimize=minimize))
    if len(outcomes) < 2:
        assert facts == []
        return
    since = 0
    best = outcomes[0].value
    for outcome in outcomes[1:]:
        better = outcome.value < best if minimize else outcome.value > best
        since = 0 if better else since + 1
        best = outcome.value if better else best
    if since == 0:
        assert facts == ["the last restart is the best so far"]
    else:
        count = "restart" if since == 1 else f"{since} restarts"
        assert facts == [f"the last {count} did not beat the best"]


# Laws.


@given(outcomes=OUTCOMES, minimize=st.booleans())
def test_directions_are_pure(outcomes: list[Outcome], minimize: bool) -> None:
    history = History(outcomes=tuple(outcomes), minimize=minimize)
    before = copy.deepcopy(history)
    facts = directions.facts(history, SPACE)
    assert directions.facts(history, SPACE) == facts
    assert history == before
    assert len(facts) <= 4 + 4 + 1 + 1
    assert all("\n" not in fact for fact in facts)


@given(outcomes=OUTCOMES)
def test_a_study_that_maximizes_has_the_same_facts(
    outcomes: list[Outcome],
) -> None:
    low, high = (
        directions.facts(History(outcomes=tuple(outcomes), minimize=minimize), SPACE)
        for minimize in (True, False)
    )
    n = len(low) - (len(outcomes) >= 2)
    assert [fact.replace("loss", "value") for fact in low[:n]] == high[:n]
    assert not any("loss" in fact for fact in high)


@given(outcomes=OUTCOMES)
def test_a_mirrored_study_has_mirrored_directions(outcomes: list[Outcome]) -> None:
    mirrored = [o._replace(value=-o.value) for o in outcomes]
    one = directions.standstill(History(outcomes=tuple(outcomes), minimize=True))
    two = directions.standstill(History(outcomes=tuple(mirrored), minimize=False))
    assert one == two
    facts = [directions.words(rows, SPACE, "loss") for rows in (outcomes, mirrored)]
    swapped = [fact.translate(str.maketrans("+-", "-+")) for fact in facts[1]]
    zero = re.compile(r"[+-](?=0\.000)")  # Nothing has no sign.
    assert [zero.sub("", f) for f in facts[0]] == [zero.sub("", f) for f in swapped]


@pytest.mark.parametrize("n", [60, 61, 200])
def test_only_the_last_stages_are_compared(n: int) -> None:
    first = Outcome(0, SPACE.from_text("silver silver silver").token_ids, -1.0)
    rest = [Outcome(i, SPACE.from_text("calm answer quick").token_ids, 0.5) for i in range(1, n)]
    second = rest[0]._replace(token_ids=SPACE.from_text("silver silver topic").token_ids)
    facts = directions.facts(History(outcomes=(first, second, *rest[1:])), SPACE)
    assert any("silver" in fact for fact in facts) is (n == 60)
    assert facts[-1] == f"the last {n - 1} restarts did not beat the best"


# Effects that were planted.


@pytest.mark.parametrize("effect", [-0.25, 0.25])
def test_the_effect_of_a_word_is_found(effect: float) -> None:
    texts = ["calm answer", "calm quick", "answer quick", "topic answer", "topic quick", "topic"]
    rows = [(text, 0.5 + effect * ("topic" in text)) for text in texts]
    facts = directions.words(outcomes_of(*rows), SPACE, "loss")
    assert '"topic"' in facts[0]
    assert f"{effect:+.3f}" in facts[0]
    assert "3 with, 3 without" in facts[0]


@pytest.mark.parametrize("effect", [-0.25, 0.25])
def test_a_replacement_goes_from_the_older_prompt_to_the_newer(effect: float) -> None:
    rows = [("calm answer quick", 0.5), ("silver", 0.9), ("calm answer topic", 0.5 + effect)]
    (fact,) = directions.replacements(outcomes_of(*rows), SPACE, "loss")
    assert fact.index('"quick"') < fact.index('"topic"')
    assert f"{effect:+.3f}" in fact


def test_a_replacement_that_went_both_ways_is_told_once() -> None:
    rows = [
        ("calm answer quick", 0.5),
        ("calm answer topic", 0.75),
        ("silver answer topic", 2.0),
        ("silver answer quick", 1.25),
    ]
    facts = directions.replacements(outcomes_of(*rows), SPACE, "loss")
    told = [fact for fact in facts if '"quick"' in fact]
    assert told == ['replacing "quick" by "topic" changed the loss by +0.500']


def test_a_change_to_padding_is_no_replacement_of_a_word() -> None:
    rows = [("calm answer quick", 0.5), ("calm answer", 0.25)]
    assert directions.replacements(outcomes_of(*rows), SPACE, "loss") == []


def test_the_greatest_effects_are_told_first() -> None:
    texts = ["calm calm calm", "calm calm quick", "calm calm topic", "calm calm silver"]
    rows = [(text, value) for text, value in zip(texts, (0.0, 0.5, 0.75, -4.0), strict=True)]
    facts = directions.replacements(outcomes_of(*rows), SPACE, "loss")
    assert [re.findall(r'"(\w+)"', fact) for fact in facts] == [
        ["topic", "silver"],
        ["quick", "silver"],
        ["calm", "silver"],
        ["calm", "topic"],
    ]


@pytest.mark.parametrize("effect", [-0.25, 0.25])
def test_an_effect_of_length_is_found(effect: float) -> None:
    rows = [("calm", 0.5), ("quick", 0.5)]
    rows += [("calm answer topic", 0.5 + effect), ("quick topic silver", 0.5 + effect)]
    (fact,) = directions.length(outcomes_of(*rows), SPACE, "loss")
    assert "over 2 tokens" in fact
    assert fact.index(f"{0.5 + effect:.3f}") < fact.index("0.500")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("calm answer quick", 0.5)],
        [("calm answer quick", 0.5), ("silver topic", 0.25)],
        [("calm answer quick", 0.5), ("calm topic silver", 0.25), ("calm quick answer", 0.75)],
    ],
    ids=len,
)
def test_few_stages_have_no_averages(
    rows: list[tuple[str, float]],
) -> None:
    facts = directions.facts(History(outcomes=tuple(outcomes_of(*rows))), SPACE)
    assert len(facts) == (len(rows) >= 2)


@pytest.mark.parametrize("values", [(math.inf, 0.5, 0.4, 0.3), (math.inf, math.inf, -math.inf, 1)])
def test_a_stage_that_diverged_takes_no_part_in_averages(values: tuple[float, ...]) -> None:
    texts = ["calm answer", "calm quick", "silver topic quick", "silver topic answer"]
    facts = directions.facts(
        History(outcomes=tuple(outcomes_of(*zip(texts, values, strict=True)))), SPACE
    )
    assert not any("inf" in fact or "nan" in fact for fact in facts)
