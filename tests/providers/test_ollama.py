from __future__ import annotations

import copy
import json
import pickle
import socket
import time
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import reply as reply_format
from optuna_llm_catalyst.providers import CompletionRequest
from tests.ollama_server import Fault
from tests.ollama_server import OllamaServer
from tests.ollama_server import Reply
from tests.toy_stage import reply
from tests.toy_stage import texts
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space


REQUEST = CompletionRequest("Write a prompt.", reply_format.schema(2), seed=17, trial_number=3)
GOOD = reply("calm answer quick", "topic label clear")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer's machine sets for Ollama and for proxies is not part of the tests."""
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_the_server_is_asked_for_exactly_this() -> None:
    with OllamaServer([GOOD]) as server:
        OllamaProvider("gemma3:4b", host=server.url).complete(REQUEST)
    (body,) = server.chats
    assert body.pop("tools", []) == []
    assert body == {
        "model": "gemma3:4b",
        "messages": [{"role": "user", "content": "Write a prompt."}],
        "format": REQUEST.schema,
        "options": {"seed": 17, "num_ctx": 8192, "num_predict": 1024, "temperature": 0.8},
        "think": False,
        "keep_alive": "30m",
        "stream": False,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_ctx": 4096}, {"options.num_ctx": 4096}),
        ({"num_predict": 77}, {"options.num_predict": 77}),
        ({"temperature": 0.0}, {"options.temperature": 0.0}),
        ({"think": True}, {"think": True}),
        ({"keep_alive": "2h"}, {"keep_alive": "2h"}),
        ({"keep_alive": 0}, {"keep_alive": 0}),
    ],
)
def test_an_argument_reaches_the_server(
    arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    with OllamaServer([GOOD]) as server:
        OllamaProvider("gemma3:4b", host=server.url, **arguments).complete(REQUEST)
    (body,) = server.chats
    flat = body | {f"options.{name}": value for name, value in body["options"].items()}
    assert {name: flat[name] for name in expected} == expected


def test_a_seed_of_zero_is_a_seed() -> None:
    with OllamaServer([GOOD]) as server:
        request = CompletionRequest("Write a prompt.", {}, seed=0)
        OllamaProvider(host=server.url).complete(request)
    assert server.chats[0]["options"]["seed"] == 0


def test_a_completion_carries_the_reply_and_the_facts_for_the_record() -> None:
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider("gemma3:4b", host=server.url)
        completion = provider.complete(REQUEST)
        digest = server.digest("gemma3:4b")
    assert completion.text == GOOD
    assert completion.model == "gemma3:4b"
    assert completion.details == {
        "digest": digest,
        "options": {"seed": 17, "num_ctx": 8192, "num_predict": 1024, "temperature": 0.8},
        "prompt_tokens": 120,
        "reply_tokens": 30,
        "load_seconds": 0.5,
    }
    assert json.loads(json.dumps(completion.details)) == completion.details
    assert provider.name == "ollama:gemma3:4b"


def test_text_of_any_script_arrives_as_it_left() -> None:
    text = reply("ruhige Antwort é", "落ち着いた 🙂", 'quotes " and \\')
    with OllamaServer(lambda body: body["messages"][0]["content"]) as server:
        request = CompletionRequest(text, {}, seed=1)
        assert OllamaProvider(host=server.url).complete(request).text == text


def test_counts_that_the_server_leaves_out_are_none() -> None:
    counts = ("prompt_eval_count", "eval_count", "load_duration")
    answer = {"message": {"role": "assistant", "content": GOOD}, **dict.fromkeys(counts)}
    with OllamaServer([answer]) as server:
        details = OllamaProvider(host=server.url).complete(REQUEST).details
    assert (details["prompt_tokens"], details["reply_tokens"]) == (None, None)
    assert details["load_seconds"] == 0


def whole(content: str, **fields: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content}, **fields}


FAULTS: dict[str, tuple[Reply, str]] = {
    "reset before a byte": (Fault(drop="before"), "gave no usable answer"),
    "reset inside the body": (Fault(body=whole(GOOD), drop="inside"), "gave no usable answer"),
    "too slow": (Fault(delay=30), r"did not answer within 0\.3 seconds"),
    "400": (
        Fault(400, {"error": '"gemma3:4b" does not support chat'}),
        'HTTP 400: "gemma3:4b" does not support chat',
    ),
    "404 of the scheduler": (
        Fault(404, {"error": 'model "gemma3:4b" not found, try pulling it first'}),
        "`ollama pull gemma3:4b`",
    ),
    "404 of something else": (
        Fault(404, "404 page not found", "text/plain"),
        "HTTP 404: 404 page not found",
    ),
    "500": (Fault(500, {"error": "llama runner stopped"}), "HTTP 500: llama runner stopped"),
    "503": (Fault(503, {"error": "server busy, please try again"}), "HTTP 503: server busy"),
    "500 with a page": (Fault(500, "<html>Bad gateway</html>", "text/html"), "HTTP 500: <html>"),
    "500 without a body": (Fault(500), "HTTP 500"),
    "error body is a list": (Fault(500, ["boom"]), "gave no usable answer"),
    "error body is a string": (Fault(500, '"boom"'), "gave no usable answer"),
    "error body is null": (Fault(500, "null"), "gave no usable answer"),
    "200 with a page": (Fault(200, "<html>Sign in</html>", "text/html"), "gave no usable answer"),
    "200 without a body": (Fault(200), "gave no usable answer"),
    "cut JSON": (Fault(200, json.dumps(whole(GOOD))[:-9]), "gave no usable answer"),
    "JSON is a list": (Fault(200, [whole(GOOD)]), "gave no usable answer"),
    "JSON is a string": (Fault(200, '"calm"'), "gave no usable answer"),
    "JSON is null": (Fault(200, "null"), "gave no usable answer"),
    "JSON without end": (Fault(200, "[" * 100_000), "gave no usable answer"),
    "invalid UTF-8": (
        Fault(200, b'{"message": {"content": "\xff\xfe"}}'),
        "gave no usable answer",
    ),
    "no message": (Fault(200, {"model": "gemma3:4b", "done": True}), "gave no usable answer"),
    "message is a string": ({"message": "calm"}, "gave no usable answer"),
    "content is a number": ({"message": {"role": "assistant", "content": 3}}, "gave no usable"),
    "empty content": (whole(""), "answered with an empty reply"),
    "blank content": (whole(" \n"), "answered with an empty reply"),
    "no content": ({"message": {"role": "assistant"}}, "answered with an empty reply"),
    "only thoughts": (
        {"message": {"role": "assistant", "content": "", "thinking": "hm"}},
        "answered with an empty reply",
    ),
    "not done": (whole(GOOD, done=False, done_reason=None), "done=False"),
    "done is missing": (
        Fault(200, {"model": "gemma3:4b", "message": {"role": "assistant", "content": GOOD}}),
        "done=None",
    ),
    "too long": (whole(GOOD[:20], done_reason="length"), "done_reason='length'"),
    "only loaded": (whole("", done_reason="load"), "done_reason='load'"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_whatever_goes_wrong_is_one_kind_of_error(fault: Reply, message: str) -> None:
    slow = isinstance(fault, Fault) and fault.delay > 0
    timeout = 0.3 if slow else 10
    with OllamaServer([fault, GOOD]) as server:
        provider = OllamaProvider("gemma3:4b", host=server.url, timeout=timeout)
        with pytest.raises(ProviderError, match=message):
            provider.complete(REQUEST)
        assert len(server.chats) == 1
        assert slow or provider.complete(REQUEST).text == GOOD


def test_a_server_that_is_not_there_is_an_error_that_names_it() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    provider = OllamaProvider(host=url)
    for call in (lambda: provider.complete(REQUEST), provider.check, provider.models):
        with pytest.raises(ProviderError, match=f"no Ollama server answers at {url}"):
            call()


def test_a_missing_model_is_an_error_that_says_how_to_get_it() -> None:
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider("qwen3:4b", host=server.url)
        for call in (lambda: provider.complete(REQUEST), provider.check):
            with pytest.raises(ProviderError, match="`ollama pull qwen3:4b`"):
                call()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, {"error": "boom"}),
        Fault(404, "404 page not found", "text/plain"),
        Fault(200, []),
        Fault(200, "null"),
        Fault(200, {"models": [{"model": None}]}),
        Fault(drop="before"),
    ],
)
def test_a_reply_without_a_digest_is_still_a_reply(fault: Fault) -> None:
    with OllamaServer([GOOD], faults={"/api/tags": fault}) as server:
        completion = OllamaProvider(host=server.url).complete(REQUEST)
    assert completion.text == GOOD
    assert completion.details["digest"] is None


@pytest.mark.parametrize(
    ("model", "served"),
    [
        ("gemma3:4b", ("gemma3:4b",)),
        ("gemma3", ("gemma3:latest",)),
        ("registry.local:5000/team/gemma3", ("registry.local:5000/team/gemma3:latest",)),
    ],
)
def test_a_model_that_the_server_has_passes_the_check(model: str, served: tuple[str, ...]) -> None:
    with OllamaServer([GOOD], models=("other:1b", *served)) as server:
        provider = OllamaProvider(model, host=server.url)
        provider.check()
        assert server.chats == []
        assert provider.models().keys() == {"other:1b", *served}
        assert provider.complete(REQUEST).details["digest"] == server.digest(served[0])


@pytest.mark.parametrize(
    ("model", "served"), [("gemma3", "gemma3:4b"), ("gemma3:4b", "gemma3:latest")]
)
def test_a_tag_is_part_of_a_model_s_name(model: str, served: str) -> None:
    with OllamaServer(models=(served,)) as server:
        with pytest.raises(ProviderError, match=f"`ollama pull {model}`"):
            OllamaProvider(model, host=server.url).check()


HOSTS = (
    "http://127.0.0.1:{}",
    "127.0.0.1:{}",
    "http://localhost:{}",
    "localhost:{}",
    "0.0.0.0:{}",
)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_does_not_take_requests_to_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider(host=host.format(server.port), timeout=10)
        assert provider.complete(REQUEST).text == GOOD


def test_a_proxy_of_the_environment_takes_requests_to_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with OllamaServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with pytest.raises(ProviderError):
            OllamaProvider(host="http://ollama.invalid:11434", timeout=10).check()
    assert [request.path for request in proxy.requests] == ["http://ollama.invalid:11434/api/tags"]


def test_the_server_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with OllamaServer([GOOD]) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        provider = OllamaProvider()
        assert provider.host == server.url
        assert provider.complete(REQUEST).text == GOOD
        elsewhere = OllamaProvider(host="http://127.0.0.1:1")
    assert elsewhere.host == "http://127.0.0.1:1"


def test_without_a_host_it_is_this_machine_s_usual_port() -> None:
    assert OllamaProvider().host == "http://127.0.0.1:11434"


@pytest.mark.parametrize(
    "host", ["http://[::1", "http://127.0.0.1:port", "127.0.0.1:99999", "http://\x00", "ftp://x"]
)
def test_a_host_that_is_no_url_is_an_error_that_names_it(host: str) -> None:
    provider = OllamaProvider(host=host)
    for call in (lambda: provider.complete(REQUEST), provider.check):
        with pytest.raises(ProviderError) as caught:
            call()
        assert host in str(caught.value) or repr(host) in str(caught.value)


def test_copies_make_their_own_client() -> None:
    with OllamaServer([GOOD] * 3) as server:
        provider = OllamaProvider("gemma3:4b", host=server.url, num_predict=77)
        assert provider.complete(REQUEST).text == GOOD
        for twin in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
            assert twin.complete(REQUEST).text == GOOD
    first, *others = server.chats
    assert others == [first, first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "`model` must name a model, .* got an empty string"),
        ({"timeout": 0}, "`timeout` must be positive, got 0 seconds"),
        ({"timeout": -1.5}, "`timeout` must be positive, got -1.5 seconds"),
        ({"num_predict": 0}, "`num_predict` must be positive .* got 0 and 8192"),
        ({"num_predict": 8192}, "below `num_ctx`, got 8192 and 8192"),
        ({"num_ctx": 512}, "below `num_ctx`, got 1024 and 512"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OllamaProvider(**arguments)


def test_a_study_restarts_from_what_the_server_replies() -> None:
    space = word_space(3)
    prompts = texts(6)

    def chat(body: dict[str, Any]) -> str:
        return reply(prompts[len(server.chats) + 1], "calm answer quick")

    with OllamaServer(chat) as server:
        sampler = LLMCatalystSampler(
            space,
            OllamaProvider("gemma3:4b", host=server.url),
            task_description="Sort messages.",
            startup_prompts=prompts[:2],
            seed=0,
        )
        study = optuna.create_study(sampler=sampler)
        study.optimize(ToyObjective(space), n_trials=6)
    assert [trial.user_attrs["prompt"] for trial in study.trials] == prompts
    assert [trial.user_attrs["origin"] for trial in study.trials] == ["startup"] * 2 + ["llm"] * 4
    for i, (trial, body) in enumerate(zip(study.trials[2:], server.chats, strict=True), 2):
        asked = body["messages"][0]["content"]
        assert "Sort messages." in asked
        assert all(f'"{prompt}"' in asked for prompt in prompts[:i])
        assert not any(f'"{prompt}"' in asked for prompt in prompts[i:])
        assert trial.user_attrs["llm_tokens"] == 150
        proposal = records.load(trial, "proposal")
        assert proposal is not None
        assert proposal["meta_prompt"] == asked
        assert proposal["seed"] == body["options"]["seed"]
        assert proposal["digest"] == server.digest("gemma3:4b")
        assert proposal["failure"] is None
    seeds = {body["options"]["seed"] for body in server.chats}
    assert len(seeds) == 4


def test_a_study_outlives_a_server_that_goes_away() -> None:
    space = word_space(3)
    with OllamaServer([reply("silver river stone")]) as server:
        sampler = LLMCatalystSampler(space, OllamaProvider(host=server.url), seed=0)
        study = optuna.create_study(sampler=sampler)
        study.optimize(ToyObjective(space), n_trials=4)
    started = time.monotonic()
    study.optimize(ToyObjective(space), n_trials=2)
    assert time.monotonic() - started < 10
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    assert origins == ["startup"] * 3 + ["llm"] + ["mutation"] * 2
    failure = (records.load(study.trials[-1], "proposal") or {})["failure"]
    assert failure == f"ProviderError: no Ollama server answers at {server.url}"
