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
from optuna_llm_catalyst.providers import CompletionRequest


def answer(provider: ReplayProvider, *, trial: int = 0, call: int = 0) -> str:
    request = CompletionRequest("prompt", {}, 0, trial_number=trial, call_index=call)
    completion = provider.complete(request)
    assert completion.model == "replay"
    return completion.text


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "replies.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_replies_are_given_in_the_order_of_requests() -> None:
    provider = ReplayProvider(["first", "second"])
    assert [answer(provider, trial=9, call=i) for i in (0, 1, 0)] == ["first", "second", "first"]
    assert provider.name == "replay:list"


@pytest.mark.parametrize("as_text", [True, False])
def test_a_row_with_a_trial_answers_that_trial_only(tmp_path: Path, as_text: bool) -> None:
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


def test_a_request_beyond_the_record_is_an_error_that_names_it() -> None:
    provider = ReplayProvider(["first"])
    with pytest.raises(ProviderError, match=r"trial 12 \(request 1 of the study\) in list"):
        answer(provider, trial=12, call=1)


def test_copies_answer_alike() -> None:
    provider = ReplayProvider(["first", "second"])
    for twin in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
        assert [answer(twin, call=i) for i in (1, 0)] == ["second", "first"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("not json", "not JSON"),
        ('{"reply": "cut', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["first"]', r'expected \{"reply": "\.\.\."\}, got \["first"\]'),
        ('{"text": "first"}', r"expected .* got \{"),
        ('{"reply": 1}', "expected"),
        ('{"reply": null}', "expected"),
        ('{"reply": "first", "trial": "7"}', "must be a trial number, got '7'"),
        ('{"reply": "first", "trial": null}', "must be a trial number, got None"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(
    tmp_path: Path, row: str, problem: str
) -> None:
    path = written(tmp_path, {"reply": "first"}, "", row)
    with pytest.raises(DataError, match=rf"replies\.jsonl:3: .*{problem}"):
        ReplayProvider(path)


@pytest.mark.parametrize("content", [None, b'{"reply": "\xff"}'])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "replies.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"replies\.jsonl: recorded replies cannot be read"):
        ReplayProvider(path)
