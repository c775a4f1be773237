from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.proposers import meta_prompt
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.toy_stage import texts
from tests.toy_stage import word_space


SPACE = word_space(3)
TASK = "Sort customer messages by what they are about."


@given(n_points=st.integers(1, 10), minimize=st.booleans())
def test_the_ranking_is_worst_first_and_best_last(n_points: int, minimize: bool) -> None:
    prompts = texts(n_points)
    history = history_of(
        SPACE, [(text, i / 10) for i, text in enumerate(prompts)], minimize=minimize
    )
    text = meta_prompt.build(request_of(SPACE, history), TASK)
    places = [text.index(f'"{prompt}"') for prompt in prompts]
    assert places == sorted(places, reverse=True)
    assert ("lower is better" in text) is minimize
    assert ("higher is better" in text) is not minimize


@pytest.mark.parametrize(("n_candidates", "length"), [(1, 3), (6, 11)])
def test_it_says_how_many_prompts_of_what_length_are_wanted(
    n_candidates: int, length: int
) -> None:
    request = request_of(word_space(length), n_candidates=n_candidates)
    text = meta_prompt.build(request, TASK)
    assert f"Write {n_candidates} new prompts" in text
    assert f"at most {length} short words" in text
    assert TASK in text
    assert '{"prompts": [' in text


def test_what_is_in_flight_has_a_section_if_there_is_anything() -> None:
    history = history_of(SPACE, [("calm answer quick", 0.1)])
    title = "Being tried right now"
    assert title not in meta_prompt.build(request_of(SPACE, history), TASK)
    flying = replace(history, in_flight=(SPACE.from_text("silver river stone"),))
    text = meta_prompt.build(request_of(SPACE, flying), TASK)
    assert '"silver river stone"' in text.partition(title)[2]
    assert '"silver river stone"' not in text.partition(title)[0]


def test_an_empty_history_is_said() -> None:
    text = meta_prompt.build(request_of(SPACE, History()), "  ")
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
        ({"kind": "candidate"}, "loss 0.125 without training"),
        ({"kind": "projection"}, "loss 0.125 without training"),
    ],
)
def test_a_line_tells_what_is_known_of_a_prompt(fields: dict[str, object], line: str) -> None:
    history = history_of(SPACE, [("calm answer quick", 0.125)])
    point = replace(history.points[0], **fields)  # type: ignore[arg-type]
    text = meta_prompt.build(request_of(SPACE, replace(history, points=(point,))), TASK)
    lines = [each for each in text.splitlines() if each.startswith('- "calm')]
    assert len(lines) == 1
    assert lines[0].endswith(line)


def test_a_value_that_is_maximized_is_not_called_a_loss() -> None:
    history = history_of(SPACE, [("calm answer quick", 0.125)], minimize=False)
    text = meta_prompt.build(request_of(SPACE, history), TASK)
    assert '"calm answer quick": value 0.125' in text
    assert "loss" not in text


def test_the_same_request_gives_the_same_text() -> None:
    request = request_of(SPACE, history_of(SPACE, [(text, 0.5) for text in texts(4)]))
    assert meta_prompt.build(request, TASK) == meta_prompt.build(request, TASK)
