from __future__ import annotations

import copy
import json
from pathlib import Path
import pickle
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import DataError
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest


def complete(
    provider: ReplayProvider, *, trial: int = 0, call: int = 0, attempt: int = 0
) -> Completion:
    return provider.complete(
        CompletionRequest(
            "prompt", {}, 0, trial_number=trial, proposal_index=call, attempt=attempt
        )
    )


def answer(provider: ReplayProvider, **numbers: int) -> str:
    completion = complete(provider, **numbers)
    assert (completion.model, completion.problem, completion.details) == ("replay", "", {})
    return completion.text


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "replies.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_replies_in_the_order_of_requests() -> None:
    provider = ReplayProvider(["first", "second"])
    assert [answer(provider, trial=9, call=i) for i in (0, 1, 0)] == ["first", "second", "first"]
    assert provider.name == "replay:list"


@pytest.mark.parametrize("as_text", [True, False])
def test_row_of_a_trial(tmp_path: Path, as_text: bool) -> None:
    path = written(
        tmp_path,
        {"reply": "for trial 7", "trial": 7},
        {"reply": "first"},
        "",
        {"reply": "for trial 0", "trial": 0},
        {"reply": "second"},
    )
    provider = ReplayProvider(str(path) if as_text else path)
    assert provider.name == "replay:replies.jsonl"
    assert answer(provider, trial=7, call=0) == "for trial 7"
    assert answer(provider, trial=0, call=99) == "for trial 0"
    assert [answer(provider, trial=3, call=i) for i in (0, 1)] == ["first", "second"]


def test_row_of_an_attempt(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"trial": 4, "attempt": 1, "reply": "second"},
        {"trial": 4, "attempt": 0, "reply": "first"},
        {"trial": 5, "reply": "only"},
    )
    provider = ReplayProvider(path)
    assert [answer(provider, trial=4, attempt=i) for i in (0, 1)] == ["first", "second"]
    assert answer(provider, trial=5) == "only"
    for trial, attempt in ((4, 2), (5, 1), (6, 0)):
        with pytest.raises(ProviderError, match=f"to attempt {attempt} of trial {trial}"):
            answer(provider, trial=trial, attempt=attempt)


@pytest.mark.parametrize("attempt", [1, 2])
def test_replies_in_order_answer_first_attempts_only(attempt: int) -> None:
    provider = ReplayProvider(["first", "second"])
    assert answer(provider, trial=3, call=1) == "second"
    with pytest.raises(ProviderError, match=f"list has no reply to attempt {attempt} of trial 3"):
        answer(provider, trial=3, call=1, attempt=attempt)


def test_rows_in_order_and_of_an_attempt(tmp_path: Path) -> None:
    path = written(tmp_path, {"reply": "in order"}, {"trial": 3, "attempt": 1, "reply": "again"})
    provider = ReplayProvider(path)
    assert [answer(provider, trial=3, attempt=i) for i in (0, 1)] == ["in order", "again"]


@pytest.mark.parametrize("place", [{}, {"trial": 3}, {"trial": 3, "attempt": 0}])
def test_model_and_problem_of_a_row(tmp_path: Path, place: dict[str, int]) -> None:
    row = {"reply": "calm", "model": "gemma3:4b", "problem": "it broke off"}
    provider = ReplayProvider(written(tmp_path, {**place, **row}))
    assert complete(provider, trial=3) == Completion("calm", "gemma3:4b", "it broke off")


@pytest.mark.parametrize("place", [{}, {"trial": 3}, {"trial": 3, "attempt": 0}])
def test_recorded_error(tmp_path: Path, place: dict[str, int]) -> None:
    provider = ReplayProvider(written(tmp_path, {**place, "error": "the line is dead"}))
    with pytest.raises(ProviderError, match="^the line is dead$") as caught:
        complete(provider, trial=3)
    # The recorded study has tried again already.
    assert not caught.value.transient


def test_recorded_error_counts_in_the_order(tmp_path: Path) -> None:
    path = written(tmp_path, {"reply": "first"}, {"error": "busy"}, {"reply": "third"})
    provider = ReplayProvider(path)
    assert [answer(provider, call=i) for i in (0, 2)] == ["first", "third"]
    with pytest.raises(ProviderError, match="^busy$"):
        answer(provider, call=1)


@example(replies=["a\u2028b\u2029c", "a\x85b\x1cc\r\nd"])
@given(replies=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_replies_survive_their_file(
    tmp_path_factory: pytest.TempPathFactory, replies: list[str]
) -> None:
    path = tmp_path_factory.mktemp("replay") / "replies.jsonl"
    rows = [json.dumps({"reply": reply}, ensure_ascii=False) for reply in replies]
    path.write_text("\n".join(rows), encoding="utf-8")
    provider = ReplayProvider(path)
    assert [answer(provider, call=i) for i in range(len(replies))] == replies


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"reply": "first"}', encoding="utf-8-sig")
    assert answer(ReplayProvider(path)) == "first"


def test_request_beyond_the_record() -> None:
    provider = ReplayProvider(["first"])
    message = "list has no reply to attempt 0 of trial 12, which is the study's request 1$"
    with pytest.raises(ProviderError, match=message):
        answer(provider, trial=12, call=1)


def test_copies() -> None:
    provider = ReplayProvider(["first", "second"])
    for twin in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
        assert [answer(twin, call=i) for i in (1, 0)] == ["second", "first"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("not json", "not JSON"),
        ('{"reply": "cut', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"reply": ' + "9" * 5000 + "}", "integer"),
        ('["first"]', r"must be an object, got \['first'\]"),
        ('{"text": "first"}', r'expected \{"reply": "\.\.\."\} or .* in \{"text"'),
        ("{}", "expected"),
        ('{"reply": null}', "expected"),
        ('{"reply": 1}', '"reply" must be a text or null, got 1'),
        ('{"error": 500}', '"error" must be a text or null, got 500'),
        ('{"reply": "first", "problem": null}', '"problem" must be a text, got None'),
        ('{"reply": "first", "model": ["gemma3"]}', r'"model" must be a text, got \['),
        ('{"reply": "first", "trial": 7, "attempt": "1"}', "must be a whole number, got '1'"),
        ('{"reply": "first", "trial": 7, "attempt": null}', "must be a whole number, got None"),
        ('{"reply": "first", "trial": 7, "attempt": true}', "must be a whole number, got True"),
        ('{"reply": "first", "trial": 7.5}', r"must be a whole number or null, got 7\.5"),
        ('{"reply": "first", "trial": "7"}', "must be a whole number or null, got '7'"),
    ],
)
def test_invalid_row_is_named_by_its_line(tmp_path: Path, row: str, problem: str) -> None:
    path = written(tmp_path, {"reply": "first"}, "", row)
    with pytest.raises(DataError, match=rf"replies\.jsonl:3: .*{problem}"):
        ReplayProvider(path)


@pytest.mark.parametrize("content", [None, b'{"reply": "\xff"}'])
def test_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "replies.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"replies\.jsonl: recorded replies cannot be read"):
        ReplayProvider(path)
