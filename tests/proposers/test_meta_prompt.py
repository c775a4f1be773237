from __future__ import annotations

from dataclasses import replace
import json
import random

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers.meta_prompt import MetaPrompt
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import INSTRUCTIONS
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.base import estimated_tokens
from tests.proposers.requests import ALL_SECTIONS
from tests.proposers.requests import full_history
from tests.proposers.requests import FULL_OPTIONS
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.tokenizer_zoo import plain_ids
from tests.tokenizer_zoo import word_piece
from tests.toy_stage import texts
from tests.toy_stage import word_space


SPACE = word_space(3)
CUT = SPACE.from_text("calm answer quick glass")
TASK = "Sort customer messages by what they are about."
OPTIONS = MetaPromptOptions(TASK, sections=DEFAULT_SECTIONS)


def text_of(request: ProposalRequest, options: MetaPromptOptions = OPTIONS) -> str:
    return meta_prompt.build(request, options).text


# The wording.


@given(n_points=st.integers(1, 10), minimize=st.booleans())
def test_the_ranking_is_worst_first_and_best_last(n_points: int, minimize: bool) -> None:
    prompts = texts(n_points)
    history = history_of(
        SPACE, [(text, i / 10) for i, text in enumerate(prompts)], minimize=minimize
    )
    text = text_of(request_of(SPACE, history))
    places = [text.index(f'"{prompt}"') for prompt in prompts]
    assert places == sorted(places, reverse=True)
    assert ("lower is better" in text) is minimize
    assert ("higher is better" in text) is not minimize


@pytest.mark.parametrize(("n_candidates", "length"), [(1, 3), (6, 11)])
def test_it_says_how_many_prompts_of_what_length_are_wanted(
    n_candidates: int, length: int
) -> None:
    request = request_of(word_space(length), n_candidates=n_candidates)
    text = text_of(request)
    assert f"Write {n_candidates} new prompt{'s' if n_candidates > 1 else ''}." in text
    assert f"at most {length} short words" in text
    assert TASK in text
    assert '{"prompts": [' in text


def test_prompts_in_flight_have_a_section() -> None:
    history = history_of(SPACE, [("calm answer quick", 0.1)])
    title = "Being tried right now"
    assert title not in text_of(request_of(SPACE, history))
    flying = replace(history, in_flight=(SPACE.from_text("silver river stone"),))
    text = text_of(request_of(SPACE, flying))
    assert '"silver river stone"' in text.partition(title)[2]
    assert '"silver river stone"' not in text.partition(title)[0]


def test_an_empty_history_is_said() -> None:
    text = text_of(request_of(SPACE, History()), replace(OPTIONS, task_description="  "))
    assert "No prompt has been tried yet." in text
    assert "(not described)" in text
    assert "better" not in text


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, '- "calm answer quick": loss 0.125'),
        ({"before": 0.5}, "loss 0.500 before training, 0.125 after"),
        ({"accuracy": 0.75}, "loss 0.125, accuracy 0.750"),
        (
            {"accuracy": 0.75, "accuracy_before": 0.5},
            "accuracy 0.500 before training, 0.750 after",
        ),
        ({"pruned": True}, "loss 0.125, stopped early"),
        ({"prompt": CUT}, "loss 0.125, cut by 1 token to fit"),
        ({"kind": "candidate"}, "loss 0.125 without training"),
        ({"kind": "projection"}, "loss 0.125 without training"),
    ],
)
def test_a_line_tells_what_is_known_of_a_prompt(fields: dict[str, object], line: str) -> None:
    history = history_of(SPACE, [("calm answer quick", 0.125)])
    point = replace(history.points[0], **fields)  # type: ignore[arg-type]
    text = text_of(request_of(SPACE, replace(history, points=(point,))))
    lines = [each for each in text.splitlines() if each.startswith('- "calm')]
    assert len(lines) == 1
    assert lines[0].endswith(line)


def test_a_value_that_is_maximized_is_not_called_a_loss() -> None:
    history = replace(full_history(SPACE), minimize=False)
    text = text_of(request_of(SPACE, history), FULL_OPTIONS)
    assert "value 1.000 before training, 0.100 after" in text
    assert "loss" not in text


def test_the_same_request_gives_the_same_text() -> None:
    request = request_of(SPACE, full_history(SPACE))
    assert text_of(request, FULL_OPTIONS) == text_of(request, FULL_OPTIONS)


# The budget.

BUDGETS = st.integers(1, 1_500)
NAMES = st.sets(st.sampled_from(ALL_SECTIONS)).map(tuple)
HISTORIES = st.builds(
    lambda n, newest: full_history(SPACE, n, newest=newest % n),
    st.integers(1, 10),
    st.integers(0, 9),
)


def built(
    history: History, names: tuple[str, ...], max_tokens: int | None = None
) -> MetaPrompt | None:
    """The meta-prompt; None if the instructions do not fit."""
    options = replace(FULL_OPTIONS, sections=names)
    try:
        return meta_prompt.build(request_of(SPACE, history), options, max_tokens=max_tokens)
    except ProposalError:
        return None


def shown(history: History, prompt: MetaPrompt) -> list[HistoryPoint]:
    """The ranked prompts of a text, best first."""
    ranking = prompt.text.partition("Prompts tried so far")[2].partition("\n\n")[0]
    return [point for point in history.points if f'"{point.prompt.text}"' in ranking]


@given(history=HISTORIES, names=NAMES, max_tokens=BUDGETS)
def test_it_is_never_longer_than_its_budget(
    history: History, names: tuple[str, ...], max_tokens: int
) -> None:
    prompt = built(history, names, max_tokens)
    request = request_of(SPACE, history)
    kept = replace(FULL_OPTIONS, sections=() if prompt is None else prompt.sections)
    instructions = [SECTIONS[name](request, kept) for name in INSTRUCTIONS]
    if prompt is None:
        assert estimated_tokens("\n\n".join(instructions)) > max_tokens
    else:
        assert estimated_tokens(prompt.text) == prompt.estimated_prompt_tokens <= max_tokens
        assert prompt.text.startswith(f"{instructions[0]}\n\n")
        assert prompt.text.endswith(f"\n\n{instructions[1]}")


@given(history=HISTORIES, names=NAMES)
def test_the_instructions_are_whole_or_refused(history: History, names: tuple[str, ...]) -> None:
    alone = built(history, ())
    assert alone is not None
    least = built(history, names, alone.estimated_prompt_tokens)
    assert least is not None
    assert least.text == alone.text
    assert built(history, names, alone.estimated_prompt_tokens - 1) is None


def test_a_task_that_is_too_long_is_refused() -> None:
    options = MetaPromptOptions("word " * 500)
    with pytest.raises(ProposalError, match=r"about \d{3} tokens, 512 fit: raise `num_ctx`"):
        meta_prompt.build(request_of(SPACE), options, max_tokens=512)


@given(history=HISTORIES, names=NAMES, extra=st.integers(0, 100))
def test_what_fits_is_sent_whole(history: History, names: tuple[str, ...], extra: int) -> None:
    whole = built(history, names)
    assert whole is not None
    again = built(history, names, whole.estimated_prompt_tokens + extra)
    assert again is not None
    assert again.text == whole.text
    for prompt in (whole, again):
        assert prompt.n_dropped_points == 0
        assert prompt.dropped_sections == ()
        assert prompt.n_points == (len(history.points) if "ranked_prompts" in names else 0)


@given(history=HISTORIES, names=NAMES, max_tokens=BUDGETS)
def test_the_worst_prompts_are_dropped_first_and_counted(
    history: History, names: tuple[str, ...], max_tokens: int
) -> None:
    prompt = built(history, names, max_tokens)
    if prompt is None or "ranked_prompts" not in names:
        return
    points = shown(history, prompt)
    assert prompt.n_points == len(points)
    assert prompt.n_dropped_points == len(history.points) - len(points)
    if "ranked_prompts" in prompt.dropped_sections:
        assert points == []
        assert "Prompts tried so far" not in prompt.text
        return
    newest = max(history.points, key=lambda point: point.trial_number)
    assert history.points[0] in points
    assert newest in points
    # Beside the newest, those that are shown are the best.
    others = [point for point in history.points if point != newest]
    n_others = len([point for point in points if point != newest])
    assert [point for point in points if point != newest] == others[:n_others]


@given(history=HISTORIES, names=NAMES, max_tokens=BUDGETS)
def test_prompts_are_dropped_before_sections(
    history: History, names: tuple[str, ...], max_tokens: int
) -> None:
    prompt = built(history, (*names, "ranked_prompts"), max_tokens)
    if prompt is None:
        return
    if prompt.dropped_sections:
        assert prompt.n_points <= 2
    whole = built(history, (*names, "ranked_prompts"))
    assert whole is not None
    optional = [name for name in whole.sections if name not in INSTRUCTIONS]
    kept = [name for name in prompt.sections if name not in INSTRUCTIONS]
    # The first in their order go first.
    assert kept == optional[len(optional) - len(kept) :]
    assert set(prompt.dropped_sections) & {*optional} == {*optional} - {*kept}


@given(history=HISTORIES, names=NAMES, budgets=st.tuples(BUDGETS, BUDGETS))
def test_a_larger_budget_never_shows_less(
    history: History, names: tuple[str, ...], budgets: tuple[int, int]
) -> None:
    small, large = (built(history, names, budget) for budget in sorted(budgets))
    if small is None:
        return
    assert large is not None
    assert small.n_points <= large.n_points
    assert set(small.sections) <= set(large.sections)
    assert small.n_dropped_points >= large.n_dropped_points


@given(history=HISTORIES, names=NAMES, max_tokens=st.none() | BUDGETS)
def test_the_facts_are_json_and_agree_with_the_text(
    history: History, names: tuple[str, ...], max_tokens: int | None
) -> None:
    prompt = built(history, names, max_tokens)
    if prompt is None:
        return
    facts = prompt.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "template_version": meta_prompt.VERSION,
        "sections": list(prompt.sections),
        "n_points": len(shown(history, prompt)),
        "n_dropped_points": prompt.n_dropped_points,
        "dropped_sections": list(prompt.dropped_sections),
        "estimated_prompt_tokens": estimated_tokens(prompt.text),
        "max_prompt_tokens": max_tokens,
    }
    request = request_of(SPACE, replace(history, points=tuple(shown(history, prompt))))
    if "ranked_prompts" in prompt.sections:
        sent = replace(FULL_OPTIONS, sections=prompt.sections)
        blocks = [SECTIONS[name](request, sent) for name in prompt.sections]
        assert prompt.text == "\n\n".join(blocks)
    assert not set(prompt.dropped_sections) & set(prompt.sections)


def test_prompts_that_were_never_trained_go_before_the_newest_stage() -> None:
    history = full_history(SPACE, 3, newest=2)
    screened = HistoryPoint(SPACE.from_text("yellow young winter"), "candidate", 9, 0.5)
    history = replace(history, points=(*history.points, screened))
    whole = built(history, ("ranked_prompts",))
    assert whole is not None
    tight = built(history, ("ranked_prompts",), whole.estimated_prompt_tokens - 1)
    assert tight is not None
    assert shown(history, tight) == list(history.points[:3])


def test_a_section_without_anything_to_say_is_not_dropped() -> None:
    history = history_of(SPACE, [("calm answer quick", 0.5)])
    alone = meta_prompt.build(request_of(SPACE, history), replace(OPTIONS, sections=()))
    prompt = meta_prompt.build(
        request_of(SPACE, history), OPTIONS, max_tokens=alone.estimated_prompt_tokens
    )
    assert prompt.dropped_sections == ("mechanism", "ranked_prompts")


# The count.


def ranking(words: str, n: int = 10) -> str:
    """Lines of a ranking: few letters, many numbers."""
    rng = random.Random(0)
    space = word_space(8, ["a", *words.split()])
    lines = [(" ".join(rng.choices(words.split(), k=8)), rng.random()) for _ in range(n)]
    points = [replace(p, before=1.0) for p in history_of(space, lines).points]
    request = request_of(space, History(points=tuple(points)))
    return SECTIONS["ranked_prompts"](request, OPTIONS)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("My card was charged twice, and nobody answers the phone.", id="English"),
        pytest.param("我的信用卡上周被扣了两次款，而且没有人接电话。", id="Chinese"),
        pytest.param("先週、カードが二回請求されました。返金をお願いします。", id="Japanese"),
        pytest.param("สัปดาห์ที่แล้วบัตรของฉันถูกเรียกเก็บเงินสองครั้ง", id="Thai"),
        pytest.param("🙂🎉🚀", id="emoji"),
        pytest.param("\ud800 lone", id="lone surrogate"),
        pytest.param("", id="empty"),
        pytest.param(
            text_of(request_of(SPACE, full_history(SPACE)), FULL_OPTIONS), id="meta-prompt"
        ),
        pytest.param(ranking("message customer about topic label question"), id="ranking"),
        pytest.param(ranking("it is at my an to go of"), id="short words"),
        pytest.param("0.123, 4.567, 8.901", id="numbers"),
    ],
)
def test_the_count_is_rather_too_large_than_too_small(text: str) -> None:
    n_tokens = len(plain_ids(word_piece(), text.encode(errors="replace").decode()))
    assert estimated_tokens(text) >= n_tokens


@given(st.text(), st.text())
def test_the_count_grows_with_the_text(one: str, two: str) -> None:
    both = estimated_tokens(one + two)
    assert max(estimated_tokens(one), estimated_tokens(two)) <= both
    # A blank at the joint may count for the digit behind it.
    assert both <= estimated_tokens(one) + estimated_tokens(two) + 1
