"""The main job through the real client and a server that speaks Ollama's wire format."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import re
import shutil
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import records
from tests.cli.conftest import Cli
from tests.ollama_server import Fault
from tests.ollama_server import OllamaServer
from tests.openai_server import OpenAIServer


DOCTOR = ("doctor", "--model")
#: Three stages from random words come before the LLM is asked.
FIRST = ("--n-startup-trials", 3)
WORDS = ("wolf", "bread", "saw", "bear", "cheese", "drill", "good")
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
def test_replies_are_the_restarts(tune: Cli, server: OllamaServer, llm: str) -> None:
    result = tune("--stages", 5, "--llm", llm, *FIRST)

    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    assert result.code == 0
    assert f"Restarts are proposed by gemma3:4b (Ollama at {server.url})." in result.err
    assert len(server.chats) == 2
    for trial, chat in zip(study.trials[3:], server.chats, strict=True):
        proposed = json.loads(_reply(chat))["prompts"]
        proposal = records.load(trial, "proposal", dict[str, Any])
        assert proposal is not None
        scores = {c["text"]: c["score"] for c in proposal["candidates"]}
        assert list(scores) == proposed
        assert trial.user_attrs["origin"] == "llm"
        assert trial.user_attrs["prompt"] == min(proposed, key=scores.__getitem__)
        assert trial.user_attrs["llm_tokens"] == 150
        assert proposal["attempts"][0]["digest"] == server.digest("gemma3:4b")
        assert proposal["meta_prompt"] == chat["messages"][0]["content"]


def test_llm_is_told_task_and_history(tune: Cli, server: OllamaServer) -> None:
    stages = tune("--stages", 4, *FIRST, "--json").json["stages"]

    [chat] = server.chats
    asked = chat["messages"][0]["content"]
    assert "Sort texts by topic. The labels are: wild_animal, food, tool." in asked
    ranked = re.findall(r'- "(.*)": loss', asked)
    by_loss = sorted(stages[:3], key=lambda stage: -stage["loss"])
    assert ranked == [stage["prompt"] for stage in by_loss]


def test_llm_proposes_the_first_stage_from_the_task_alone(tune: Cli, server: OllamaServer) -> None:
    [stage] = tune("--stages", 1, "--json").json["stages"]

    [chat] = server.chats
    asked = chat["messages"][0]["content"]
    assert stage["origin"] == "llm" and stage["prompt"] in PROPOSALS[0]
    assert "Sort texts by topic. The labels are: wild_animal, food, tool." in asked
    assert "No prompt has been tried yet." in asked and "from the task alone" in asked


def test_meta_prompt_of_an_empty_study_is_what_is_sent_first(
    tune: Cli, cli: Cli, server: OllamaServer
) -> None:
    tune("--stages", 0, "--screen", "none")
    shown = cli("meta-prompt").out
    tune("--stages", 1, "--screen", "none")
    assert shown == server.chats[0]["messages"][0]["content"] + "\n"
    assert "One of your prompts is trained: the first." in shown


def test_startup_prompts_come_before_the_llm(tune: Cli, server: OllamaServer) -> None:
    stages = tune("--stages", 2, "--startup-prompt", "food tool", "--json").json["stages"]

    assert [stage["origin"] for stage in stages] == ["startup", "llm"]
    assert stages[0]["prompt"] == "food tool"


def test_failing_llm_leaves_the_first_stage_to_random_words(
    tune: Cli, server: OllamaServer
) -> None:
    """The tiny model's vocabulary can express no template."""
    server.replies = lambda body: "I would rather talk about the weather."
    result = tune("--stages", 2, "--json")

    assert [stage["origin"] for stage in result.json["stages"]] == ["startup", "mutation"]
    assert "stage 0 started from random words: InvalidReplyError" in result.err
    assert "stage 1 started from a mutation: InvalidReplyError" in result.err


def test_failing_llm_costs_no_stage(tune: Cli, server: OllamaServer) -> None:
    server.replies = lambda body: "I would rather talk about the weather."
    result = tune("--stages", 4, *FIRST, "--json")

    assert result.code == 0
    assert [stage["origin"] for stage in result.json["stages"]] == ["startup"] * 3 + ["mutation"]
    assert "stage 3 started from a mutation: InvalidReplyError" in result.err


def test_missing_model_is_named(tune: Cli, server: OllamaServer) -> None:
    server.models = ("qwen3:4b",)
    result = tune("--llm", "ollama:gemma3:4b")

    assert result.code == 2
    assert "`ollama pull gemma3:4b`" in result.err


INSTALLED = {
    "another chat model": (
        ("nomic-embed-text:latest", "qwen3:4b"),
        "proposed by qwen3:4b (Ollama at {url}; gemma3:4b is not installed",
    ),
    "no chat model": (("nomic-embed-text:latest", "bge-m3:latest"), "`ollama pull gemma3:4b`"),
}


@pytest.mark.parametrize(("models", "line"), INSTALLED.values(), ids=INSTALLED.keys())
def test_auto_takes_an_installed_chat_model(
    tune: Cli, server: OllamaServer, models: tuple[str, ...], line: str
) -> None:
    server.models = models
    server.capabilities = {name: ["embedding"] for name in models if "qwen" not in name}
    result = tune("--stages", 0)

    assert result.code == 0
    assert line.format(url=server.url) in result.err


def test_doctor_finds_the_llm(cli: Cli, server: OllamaServer, tiny_model: object) -> None:
    server.replies = lambda body: '{"prompts": ["what is this", "which topic"]}'
    findings = {row["what"].strip(): row for row in cli(*DOCTOR, tiny_model, "--json").json}

    assert all(row["ok"] for row in findings.values())
    assert server.url in findings["LLM auto"]["detail"]
    assert findings["server"]["detail"] == "Ollama 0.32.9"
    assert findings["context"]["detail"] == "8192 tokens, of 131072 at most"
    assert re.fullmatch(r"\d+\.\d s, 0\.5 s of it to load .*", findings["first reply"]["detail"])
    assert findings["JSON schema"]["detail"] == "kept"
    assert len(server.chats) == 2


REFUSED = {
    "the pattern": lambda schema: "pattern" in json.dumps(schema),
    "the schema": lambda schema: schema is not None and schema != "json",
}


@pytest.mark.parametrize("refused", REFUSED)
def test_doctor_tells_what_the_server_refuses(
    cli: Cli, server: OllamaServer, tiny_model: object, refused: str
) -> None:
    def reply(body: dict[str, Any]) -> Any:
        if REFUSED[refused](body["format"]):
            return Fault(400, {"error": "failed to parse grammar of the format's schema"})
        return '{"prompts": ["what is this", "which topic"]}'

    server.replies = reply
    result = cli(*DOCTOR, tiny_model, "--llm", "ollama:gemma3:4b", "--json")
    findings = {row["what"].strip(): row for row in result.json}

    assert result.code == 0 and not findings["JSON schema"]["ok"]
    assert f"kept; the server refused {refused}" in findings["JSON schema"]["detail"]
    assert "pattern" in json.dumps(server.chats[0]["format"])


def test_auto_makes_one_request_of_a_server_that_fails(tune: Cli, server: OllamaServer) -> None:
    server.faults = {"/api/tags": Fault(500, {"error": "boom"})}
    result = tune("--stages", 0)

    assert result.code == 0
    assert "by mutation" in result.err and "boom" in result.err
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("replies", "llm", "code", "what", "detail"),
    [
        ("I would rather not.", "ollama:gemma3:4b", 1, "JSON schema", "no usable reply"),
        ("I would rather not.", "auto", 0, "JSON schema", "no usable reply"),
        ('Sure: {"prompts": ["a"]}', "ollama:gemma3:4b", 0, "JSON schema", "not kept to the"),
        (Fault(500, {"error": "boom"}), "ollama:gemma3:4b", 1, "first reply", "HTTP 500: boom"),
    ],
)
def test_doctor_tells_how_the_llm_replies(
    cli: Cli,
    server: OllamaServer,
    tiny_model: object,
    replies: Any,
    llm: str,
    code: int,
    what: str,
    detail: str,
) -> None:
    server.replies = lambda body: replies
    result = cli(*DOCTOR, tiny_model, "--llm", llm, "--json")
    findings = {row["what"].strip(): row for row in result.json}
    assert result.code == code
    assert detail in findings[what]["detail"]


def test_doctor_warns_of_a_short_context(
    cli: Cli, server: OllamaServer, tiny_model: object
) -> None:
    server.replies = lambda body: '{"prompts": ["what is this", "which topic"]}'
    result = cli(*DOCTOR, tiny_model, "--num-ctx", 200_000, "--json")
    findings = {row["what"].strip(): row for row in result.json}
    assert not findings["context"]["ok"]
    assert "--num-ctx 131072" in findings["context"]["detail"]


REPLAYED = ("chosen", "first", "stages", "test")


def test_replayed_study_is_the_same(tune_and_test: Cli, cli: Cli, server: OllamaServer) -> None:
    """With a reply that is of no use, one that breaks off, and a server that fails."""
    broken_off = {"message": {"role": "assistant", "content": '{"prom'}, "done": False}
    faults: dict[int, Any] = {
        1: "I would rather talk about the weather.",
        3: broken_off,
        6: Fault(400, {"error": "no"}),
    }

    def reply(body: dict[str, Any]) -> Any:
        n = len(server.chats)
        words = f"{WORDS[n % 7]} {WORDS[(n + 2) % 7]} saw"
        return faults.get(n, json.dumps({"prompts": [words, "wolf bread saw drill bear"]}))

    server.replies = reply
    original = tune_and_test("--stages", 9, "--study-name", "original", *FIRST, "--json").json
    n_asked = len(server.chats)
    exported = cli("export", "--study-name", "original", "--replies", "replies.jsonl", "--json")
    assert exported.json == {"replies": "replies.jsonl", "n_replies": n_asked}

    llm = ("--llm", "replay:replies.jsonl", *FIRST)
    replayed = tune_and_test("--stages", 9, "--study-name", "replayed", *llm, "--json").json
    assert len(server.chats) == n_asked
    assert {key: replayed[key] for key in REPLAYED} == {key: original[key] for key in REPLAYED}
    one, two = (
        optuna.load_study(study_name=name, storage="sqlite:///catalyst.db").trials
        for name in ("original", "replayed")
    )
    assert {"startup", "llm", "mutation"} == {trial.user_attrs["origin"] for trial in one}
    for before, after in zip(one, two, strict=True):
        assert after.params == before.params
        assert after.user_attrs["prompt"] == before.user_attrs["prompt"]
        assert after.intermediate_values == before.intermediate_values
        assert records.load_trajectory(after) == records.load_trajectory(before)
        failures = [
            (records.load(t, "proposal", dict) or {}).get("failure") for t in (before, after)
        ]
        assert failures[0] == failures[1]


def test_meta_prompt_is_what_is_sent_next(tune: Cli, cli: Cli, server: OllamaServer) -> None:
    options = ("--llm", "ollama:gemma3:4b", "--n-candidates", 2, "--top-k", 3, *FIRST)
    tune("--stages", 4, *options)
    shown = cli("meta-prompt")
    as_json = cli("meta-prompt", "--json").json
    tune("--stages", 1, *options)
    sent = server.chats[-1]["messages"][0]["content"]
    assert shown.code == 0
    assert shown.out == sent + "\n"
    assert as_json["meta_prompt"] == sent
    assert f"{len(sent)} characters" in shown.err
    assert f"about {as_json['estimated_prompt_tokens']} tokens" in shown.err
    assert as_json["n_points"] == 3


def test_meta_prompt_of_other_sections(tune: Cli, cli: Cli, server: OllamaServer) -> None:
    tune("--stages", 2)
    texts = {
        name: cli("meta-prompt", "--sections", name).out for name in ("ranked_prompts", "pools")
    }
    assert "How far to go" in texts["pools"] and "worst first" not in texts["pools"]
    assert "worst first" in texts["ranked_prompts"]
    unknown = cli("meta-prompt", "--sections", "weather")
    assert unknown.code == 2 and "ranked_prompts" in unknown.err and "Traceback" not in unknown.err


@pytest.mark.parametrize("shares", [False, True])
def test_examples_are_shared_only_if_allowed(
    tune: Cli, data: Path, server: OllamaServer, shares: bool
) -> None:
    option = ("--share-examples",) if shares else ()
    sections = ("--sections", "examples,mistakes,ranked_prompts")
    result = tune("--stages", 2, *sections, *option)
    texts = {
        json.loads(line)["text"]
        for split in ("train", "validation")
        for line in (data / f"{split}.jsonl").read_text().splitlines()
    }
    asked = server.chats[-1]["messages"][0]["content"]
    kept = Path("catalyst.db").read_bytes().decode(errors="replace")
    assert any(json.dumps(text) in asked for text in texts) is shares
    assert any(text in kept for text in texts) is shares
    assert ("--share-examples" in result.err) is shares


def test_shared_texts_are_clipped(cli: Cli, data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The study keeps no more of an example than its meta-prompt shows."""
    folder = shutil.copytree(data, tmp_path / "long")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = [{**row, "text": f"{row['text']} {'long ' * 100}unseen"} for row in rows]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, texts)))
    options = ("--model", tiny_model, "--num-virtual-tokens", 3, "--stages", 0)
    result = cli("tune", folder, *options, "--share-examples", "--sections", "examples")

    kept = Path("catalyst.db").read_bytes()
    assert result.code == 0 and b"long long" in kept and b"unseen" not in kept
    assert '…"' in cli("meta-prompt").out


def test_story_of_a_restart(tune: Cli, cli: Cli, server: OllamaServer) -> None:
    replies = [
        "Nice weather.",
        json.dumps({"prompts": ["wolf bread saw drill bear", "new place"]}),
    ]
    server.replies = lambda body: replies[len(server.chats) - 1]
    tune("--stages", 4, *FIRST)
    server.__exit__(None, None, None)
    story = cli("show", "--trial", 3).out
    asked = server.chats[0]["messages"][0]["content"]
    for piece in (
        "origin llm",
        "Requested of ollama:gemma3:4b after 3 finished stages",
        asked,
        *replies,
        "Problem: InvalidReplyError: the reply has no object",
        "not used: 'wolf bread saw drill bear': it is 2 tokens too long",
        f"digest {server.digest('gemma3:4b')}",
        f"seed {server.chats[1]['options']['seed']}",
        "candidate: wolf bread saw (loss",
        "2 tokens cut off",
        "step 4: loss",
        "llm_tokens: 300",
    ):
        assert piece in story, piece


def test_openai_needs_a_url(tune: Cli) -> None:
    result = tune("--llm", "openai:qwen")
    assert result.code == 2
    assert "--llm-url http" in result.err


def test_openai_takes_the_only_model(tune: Cli) -> None:
    with OpenAIServer(lambda body: '{"prompts": ["wolf bread saw"]}') as served:
        for name in ("openai", "openai:", "openai:other"):
            result = tune("--stages", 0, "--llm", name, "--llm-url", served.url)
            assert result.code == 0, result.err
            assert f"proposed by {served.models[0]} (" in result.err


def test_llm_is_told_what_the_figures_rest_on(tune: Cli, server: OllamaServer) -> None:
    tune("--stages", 2)
    first, second = (chat["messages"][0]["content"] for chat in server.chats)
    assert "18 validation examples" in first
    assert "<prompt> <label>" in first
    assert first != second


def test_openai_server_proposes(tune: Cli) -> None:
    with OpenAIServer(lambda body: '{"prompts": ["wolf bread saw"]}') as served:
        url = served.url.replace("//", "//joe:secret@")
        options = ("--llm", f"openai:{served.models[0]}", "--llm-url", url)
        result = tune("--stages", 4, *options, *FIRST, "--json")
    assert result.code == 0, result.err
    assert "secret" not in result.err
    assert result.json["stages"][3]["prompt"] == "wolf bread saw"
    assert result.json["stages"][3]["origin"] == "llm"


@pytest.mark.parametrize("name", ["no/such-folder-or/model", "nobody/nothing"])
def test_missing_chat_model(tune: Cli, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = tune("--stages", 4, "--llm", f"transformers:{name}")
    assert result.code == 2
    assert f"model {name!r} cannot be loaded" in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("kind", ["ollama:gemma3:4b", "openai:qwen3-4b"])
def test_server_mistake_shows_no_credentials(tune: Cli, kind: str) -> None:
    page = Fault(404, "<html>\n<body>\x1b[2J Not here.\n</html>", "text/html")
    with OllamaServer(faults={"/api/show": page, "/v1/models": page}) as web:
        url = web.url.replace("//", "//joe:secret@")
        result = tune("--llm", kind, "--llm-url", f"{url}/v1" if "openai" in kind else url)
    assert result.code == 2
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1
    assert "secret" not in result.err and "\x1b" not in result.err


def test_key_for_ollama_is_refused(tune: Cli) -> None:
    result = tune("--llm", "ollama:gemma3:4b", "--llm-api-key", "sk-1")
    assert result.code == 2
    assert "--llm-api-key is for --llm openai:MODEL" in result.err and "sk-1" not in result.err


def _at_first_down(n_failures: int, server: OllamaServer) -> Any:
    """Replies that begin after a number of failures, each with a prompt of its own."""

    def reply(body: dict[str, Any]) -> Any:
        n = len(server.chats)
        if n <= n_failures:
            return Fault(400, {"error": "no"})
        return json.dumps({"prompts": [f"{WORDS[n % 7]} {WORDS[n // 7 % 7]} long"]})

    return reply


def test_breaker_is_said(tune: Cli, server: OllamaServer) -> None:
    server.replies = _at_first_down(3, server)
    said = tune("--stages", 8, "--n-startup-trials", 1).err

    assert said.count("started from a mutation: ProviderError") == 3
    assert said.count("the LLM keeps failing") == 1
    assert said.count("left alone for now") == 2
    assert said.count("the LLM answers again") == 1


def test_new_command_starts_with_a_proposal(tune: Cli, server: OllamaServer) -> None:
    """What says "proposed by gemma3:4b" proposes, whatever failed before it was reached."""
    server.replies = _at_first_down(3, server)
    tune("--stages", 4, "--n-startup-trials", 1)
    result = tune("--stages", 2, "--n-startup-trials", 1, "--json")

    assert [stage["origin"] for stage in result.json["stages"][4:]] == ["llm", "llm"]
    assert "proposed by gemma3:4b" in result.err


def test_prefetch_is_recorded(tune: Cli, server: OllamaServer) -> None:
    tune("--stages", 6, "--prefetch", *FIRST)
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    seen = [(records.load(t, "proposal", dict) or {})["history_seen"] for t in study.trials[3:]]
    assert [row["n_finished"] for row in seen] == [2, 3, 4]
    assert [row["n_in_flight"] for row in seen] == [1, 1, 1]


def test_replay_from_a_file(tune: Cli, tmp_path: Any) -> None:
    rows = [{"reply": json.dumps({"prompts": prompts[:1]})} for prompts in PROPOSALS]
    (tmp_path / "replies.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = tune("--stages", 5, "--llm", "replay:replies.jsonl", *FIRST, "--json").json["stages"]

    assert [stage["prompt"] for stage in stages[3:]] == [prompts[0] for prompts in PROPOSALS]
