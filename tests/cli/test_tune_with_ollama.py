"""The main job through the real client and a server that speaks Ollama's wire format."""

from __future__ import annotations

from collections.abc import Iterator
import json
import re
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import records
from tests.cli.conftest import Cli
from tests.ollama_server import OllamaServer


PROPOSALS = [
    ["wolf bread saw", "good long day"],
    ["bear cheese drill", "new place there"],
]


def _reply(body: dict[str, Any]) -> str:
    """Other prompts each time: how many stages there were is read off the history."""
    ranked = body["messages"][0]["content"].count(", accuracy")
    return json.dumps({"prompts": PROPOSALS[ranked % len(PROPOSALS)]})


@pytest.fixture
def server(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[OllamaServer]:
    del cli  # Sets OLLAMA_HOST to where nobody is.
    with OllamaServer(_reply) as running:
        monkeypatch.setenv("OLLAMA_HOST", running.url)
        yield running


@pytest.mark.parametrize("llm", ["auto", "ollama:gemma3:4b"])
def test_the_replies_prompts_are_the_restarts_of_the_study(
    tune: Cli, server: OllamaServer, llm: str
) -> None:
    result = tune("--stages", 5, "--llm", llm)

    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    assert result.code == 0
    assert f"Restarts are proposed by gemma3:4b (Ollama at {server.url})." in result.err
    assert len(server.chats) == 2
    for trial, chat in zip(study.trials[3:], server.chats, strict=True):
        proposed = json.loads(_reply(chat))["prompts"]
        proposal = records.load(trial, "proposal")
        assert proposal is not None
        scores = {c["text"]: c["score"] for c in proposal["candidates"]}
        assert list(scores) == proposed
        assert trial.user_attrs["origin"] == "llm"
        assert trial.user_attrs["prompt"] == min(proposed, key=scores.__getitem__)
        assert trial.user_attrs["llm_tokens"] == 150
        assert proposal["digest"] == server.digest("gemma3:4b")
        assert proposal["meta_prompt"] == chat["messages"][0]["content"]


def test_the_llm_is_told_the_task_and_the_stages_so_far(tune: Cli, server: OllamaServer) -> None:
    stages = tune("--stages", 4, "--json").json["stages"]

    [chat] = server.chats
    asked = chat["messages"][0]["content"]
    assert "Sort texts by topic. The labels are: wild_animal, food, tool." in asked
    ranked = re.findall(r'- "(.*)": loss', asked)
    by_loss = sorted(stages[:3], key=lambda stage: -stage["loss"])
    assert ranked == [stage["prompt"] for stage in by_loss]


def test_an_llm_that_fails_costs_no_stage_and_is_named(tune: Cli, server: OllamaServer) -> None:
    server.replies = lambda body: "I would rather talk about the weather."
    result = tune("--stages", 4, "--json")

    assert result.code == 0
    assert [stage["origin"] for stage in result.json["stages"]] == ["startup"] * 3 + ["mutation"]
    assert "stage 3 started from a mutation: InvalidReplyError" in result.err


@pytest.mark.parametrize("llm", ["auto", "ollama:gemma3:4b"])
def test_a_missing_model_is_named_with_the_command_that_gets_it(
    tune: Cli, server: OllamaServer, llm: str
) -> None:
    server.models = ("qwen3:4b",)
    result = tune("--llm", llm)

    assert result.code == (0 if llm == "auto" else 2)
    assert "`ollama pull gemma3:4b`" in result.err


def test_doctor_finds_the_llm(cli: Cli, server: OllamaServer, tiny_model: object) -> None:
    findings = cli("doctor", "--model", tiny_model, "--json").json

    assert {"what": "LLM auto", "ok": True}.items() <= findings[-1].items()
    assert server.url in findings[-1]["detail"]


def test_replies_can_be_replayed_from_a_file(tune: Cli, tmp_path: Any) -> None:
    rows = [{"reply": json.dumps({"prompts": prompts[:1]})} for prompts in PROPOSALS]
    (tmp_path / "replies.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = tune("--stages", 5, "--llm", "replay:replies.jsonl", "--json").json["stages"]

    assert [stage["prompt"] for stage in stages[3:]] == [prompts[0] for prompts in PROPOSALS]
