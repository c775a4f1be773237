from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
import gzip
import json
from pathlib import Path
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from typing import Any

import ollama
import optuna
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import reply as reply_format
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import ollama as ollama_module
from optuna_llm_catalyst.providers.servers import MAX_BODY
from tests.ollama_server import Fault
from tests.ollama_server import OllamaServer
from tests.ollama_server import Reply
from tests.providers.schemas import assert_steps_down_once
from tests.providers.schemas import PATTERNED
from tests.providers.schemas import PLAIN
from tests.toy_stage import reply
from tests.toy_stage import run_python
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


def test_request() -> None:
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
        ({"keep_alive": -1}, {"keep_alive": -1}),
        ({"keep_alive": "1h30m"}, {"keep_alive": "1h30m"}),
        ({"keep_alive": "0"}, {"keep_alive": "0"}),
    ],
)
def test_argument_reaches_the_server(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    with OllamaServer([GOOD]) as server:
        OllamaProvider("gemma3:4b", host=server.url, **arguments).complete(REQUEST)
    (body,) = server.chats
    flat = body | {f"options.{name}": value for name, value in body["options"].items()}
    assert {name: flat[name] for name in expected} == expected


def test_seed_of_zero() -> None:
    with OllamaServer([GOOD]) as server:
        request = CompletionRequest("Write a prompt.", {}, seed=0)
        OllamaProvider(host=server.url).complete(request)
    assert server.chats[0]["options"]["seed"] == 0


def test_completion() -> None:
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider("gemma3:4b", host=server.url)
        completion = provider.complete(REQUEST)
        digest = server.digest("gemma3:4b")
    assert completion.text == GOOD
    assert completion.model == "gemma3:4b"
    assert completion.problem == ""
    assert completion.details == {
        "digest": digest,
        "context_length": 8192,
        "done_reason": "stop",
        "options": {"seed": 17, "num_ctx": 8192, "num_predict": 1024, "temperature": 0.8},
        "prompt_tokens": 120,
        "reply_tokens": 30,
        "load_seconds": 0.5,
    }
    assert json.loads(json.dumps(completion.details)) == completion.details
    assert provider.name == "ollama:gemma3:4b"
    assert provider.max_prompt_tokens == 8192 - 1024


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with OllamaServer([GOOD]) as server:
        OllamaProvider(host=server.url).complete(REQUEST)
    assert threading.active_count() == before


def test_text_of_any_script() -> None:
    text = reply("ruhige Antwort é", "落ち着いた 🙂", 'quotes " and \\')
    with OllamaServer(lambda body: body["messages"][0]["content"]) as server:
        request = CompletionRequest(text, {}, seed=1)
        assert OllamaProvider(host=server.url).complete(request).text == text


def test_missing_counts_are_none() -> None:
    counts = ("prompt_eval_count", "eval_count", "load_duration")
    answer = {"message": {"role": "assistant", "content": GOOD}, **dict.fromkeys(counts)}
    with OllamaServer([answer]) as server:
        details = OllamaProvider(host=server.url).complete(REQUEST).details
    assert (details["prompt_tokens"], details["reply_tokens"]) == (None, None)
    assert details["load_seconds"] == 0


def test_prompt_with_a_lone_surrogate() -> None:
    with OllamaServer([GOOD]) as server:
        with pytest.raises(ProviderError) as caught:
            OllamaProvider(host=server.url).complete(replace(REQUEST, prompt="calm \ud800"))
    assert "is not the URL" not in str(caught.value)
    assert "surrogates not allowed" in str(caught.value)


def whole(content: str, **fields: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content}, **fields}


THOUGHTFUL = {"message": {"role": "assistant", "content": "", "thinking": "hm"}}
UNUSABLE = "gave no usable answer"
BROKEN = "broke the connection"

# What comes, what the error says, and whether the same request may succeed a little later.
FAULTS: dict[str, tuple[Reply, str, bool]] = {
    "reset before a byte": (Fault(drop="before"), BROKEN, True),
    "reset inside the body": (Fault(body=whole(GOOD), drop="inside"), BROKEN, True),
    "chunks that are none": (
        Fault(body="zz", headers={"Transfer-Encoding": "chunked"}),
        BROKEN,
        True,
    ),
    "silence": (Fault(delay=30), r"did not answer within 0\.3 seconds", False),
    "headers without end": (
        Fault(trickle="headers"),
        r"did not answer within 0\.3 seconds",
        False,
    ),
    "a body byte by byte": (
        Fault(body=whole(GOOD), trickle="body"),
        r"did not answer within 0\.3 seconds",
        False,
    ),
    "a body without end": (
        Fault(body=" " * 2**16, endless=True),
        f"answer is over {MAX_BODY} bytes long",
        False,
    ),
    "a body of 10 MB": (
        whole("calm " * 2_000_000),
        f"answer is over {MAX_BODY} bytes long",
        False,
    ),
    "a body of 10 MB, packed": (
        Fault(
            body=gzip.compress(json.dumps(whole("calm " * 2_000_000)).encode()),
            headers={"Content-Encoding": "gzip"},
        ),
        "a compressed answer",
        False,
    ),
    "400": (
        Fault(400, {"error": '"gemma3:4b" does not support chat'}),
        'HTTP 400: "gemma3:4b" does not support chat',
        False,
    ),
    "404 of the scheduler": (
        Fault(404, {"error": 'model "gemma3:4b" not found, try pulling it first'}),
        "`ollama pull gemma3:4b`",
        False,
    ),
    "404 of something else": (
        Fault(404, "404 page not found", "text/plain"),
        "HTTP 404: 404 page not found",
        False,
    ),
    "408": (Fault(408, {"error": "timed out"}), "HTTP 408: timed out", True),
    "429": (Fault(429, {"error": "slow down"}), "HTTP 429: slow down", True),
    "500": (Fault(500, {"error": "out of ideas"}), "HTTP 500: out of ideas", False),
    "500 of a crash": (
        Fault(500, {"error": "llama runner process has terminated"}),
        "HTTP 500: llama runner",
        True,
    ),
    "500 of a runner that died": (
        Fault(500, {"error": "an error was encountered while running the model: unexpected EOF"}),
        "HTTP 500: .* unexpected EOF",
        True,
    ),
    "502": (Fault(502, "<html>Bad gateway</html>", "text/html"), "HTTP 502: <html>", True),
    "503": (
        Fault(503, {"error": "server busy, please try again"}),
        "HTTP 503: server busy",
        True,
    ),
    "504": (Fault(504), "HTTP 504", True),
    "500 with a page": (
        Fault(500, "<html>Oh no</html>", "text/html"),
        "HTTP 500: <html>",
        False,
    ),
    "500 without a body": (Fault(500), "HTTP 500", False),
    "error is an object": (
        Fault(500, {"error": {"code": 3}}),
        'HTTP 500: {"error": {"code": 3}}',
        False,
    ),
    "error is null": (Fault(500, {"error": None}), "HTTP 500", False),
    "error body is a list": (Fault(500, ["boom"]), r'HTTP 500: \["boom"\]', False),
    "error body is a string": (Fault(500, '"boom"'), "HTTP 500: boom", False),
    "error body is null": (Fault(500, "null"), "HTTP 500: null", False),
    "error under 200": (Fault(200, {"error": "boom"}), UNUSABLE, False),
    "200 with a page": (Fault(200, "<html>Sign in</html>", "text/html"), UNUSABLE, False),
    "200 without a body": (Fault(200), UNUSABLE, False),
    "cut JSON": (Fault(200, json.dumps(whole(GOOD))[:-9]), UNUSABLE, False),
    "JSON is a list": (Fault(200, [whole(GOOD)]), UNUSABLE, False),
    "JSON is a string": (Fault(200, '"calm"'), UNUSABLE, False),
    "JSON is null": (Fault(200, "null"), UNUSABLE, False),
    "JSON without end": (Fault(200, "[" * 100_000), UNUSABLE, False),
    "JSON with a number too long": (
        Fault(200, '{"eval_count": ' + "9" * 5000 + "}"),
        UNUSABLE,
        False,
    ),
    "invalid UTF-8": (Fault(200, b'{"message": {"content": "\xff\xfe"}}'), UNUSABLE, False),
    "packed, but not really": (
        Fault(200, whole(GOOD), headers={"Content-Encoding": "gzip"}),
        "a compressed answer",
        False,
    ),
    "no message": (Fault(200, {"model": "gemma3:4b", "done": True}), UNUSABLE, False),
    "message is null": ({"message": None}, UNUSABLE, False),
    "message is a string": ({"message": "calm"}, UNUSABLE, False),
    "content is a number": (
        {"message": {"role": "assistant", "content": 3}},
        UNUSABLE,
        False,
    ),
    "only loaded": (whole("", done_reason="load"), "only loaded 'gemma3:4b'", True),
    "only unloaded": (whole("", done_reason="unload"), "only unloaded 'gemma3:4b'", True),
    "nothing within its limit": (
        whole("", done_reason="length"),
        r"used up num_predict=1024 tokens without an answer: raise `num_predict`",
        False,
    ),
}


@pytest.mark.parametrize(("fault", "message", "transient"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_a_provider_error(fault: Reply, message: str, transient: bool) -> None:
    slow = isinstance(fault, Fault) and bool(fault.delay or fault.trickle)
    request = replace(REQUEST, timeout=0.3 if slow else 10)
    with OllamaServer([fault, GOOD]) as server:
        provider = OllamaProvider("gemma3:4b", host=server.url)
        with pytest.raises(ProviderError, match=message) as caught:
            provider.complete(request)
        assert caught.value.transient == transient
        assert len(server.chats) == 1
        assert provider.complete(REQUEST).text == GOOD


@pytest.mark.parametrize(
    ("answer", "text", "problem", "reply_from"),
    [
        (whole(GOOD), GOOD, "", None),
        (whole(GOOD, done_reason=None), GOOD, "", None),
        (whole(GOOD[:9], done_reason="length"), GOOD[:9], "it was cut at num_predict=1024", None),
        (whole(GOOD, done=False, done_reason=None), GOOD, "it broke off", None),
        (
            Fault(200, {"model": "m", "message": {"role": "assistant", "content": GOOD}}),
            GOOD,
            "it broke off",
            None,
        ),
        (whole(GOOD, done_reason="tired"), GOOD, "it ended with 'tired'", None),
        (whole(""), "", "", None),
        (whole(" \n"), "", "", None),
        ({"message": {"role": "assistant"}}, "", "", None),
        (THOUGHTFUL, "hm", "", "thinking"),
        (
            {"message": {"role": "assistant", "content": "\n", "thinking": GOOD}},
            GOOD,
            "",
            "thinking",
        ),
        (
            {"message": {"role": "assistant", "content": GOOD, "thinking": "hm"}},
            GOOD,
            "",
            None,
        ),
        (
            {**THOUGHTFUL, "done_reason": "length"},
            "hm",
            "it was cut at num_predict=1024",
            "thinking",
        ),
    ],
)
def test_problem_that_the_server_tells(
    answer: Reply, text: str, problem: str, reply_from: str | None
) -> None:
    with OllamaServer([answer]) as server:
        completion = OllamaProvider(host=server.url).complete(REQUEST)
    assert completion.text.strip() == text
    assert completion.problem.startswith(problem)
    assert bool(completion.problem) == bool(problem)
    assert completion.details.get("reply_from") == reply_from


LONG = "A word or two. " * 500  # 2500 tokens by the conservative count.
SHORT = "A word or two. " * 300  # 1500 tokens.


@pytest.mark.parametrize(
    ("prompt", "n_read", "allocated", "is_cut"),
    [
        # Of 2048 tokens servers keep the end: about half of them, or all but one.
        (LONG, 1026, None, True),
        (LONG, 1022, None, True),
        (LONG, 1030, None, True),
        (LONG, 2047, None, True),
        (LONG, 2048, None, True),
        (LONG, 2050, None, True),
        (LONG, 1031, None, False),
        (LONG, 1021, None, False),
        (LONG, 1900, None, False),
        (LONG, 2046, None, False),
        (SHORT, 1026, None, False),
        (SHORT, 1200, None, False),
        (SHORT, 2047, None, True),
        # What the server has in its cache it need not read, or not count.
        (LONG, 1, None, False),
        (LONG, 0, None, False),
        (LONG, None, None, False),
        # A model that was trained for less gets less.
        (SHORT, 514, 1024, True),
        (SHORT, 1023, 1024, True),
        (SHORT, 1022, 1024, False),
        (SHORT, 700, 1024, False),
        ("A word.", 514, 1024, False),
        # One that is loaded with more already keeps it.
        (LONG, 2100, 4096, False),
        (LONG, 2050, 4096, False),
        (LONG, 4095, 4096, True),
    ],
)
def test_cut_prompt_is_an_error(
    prompt: str, n_read: int | None, allocated: int | None, is_cut: bool
) -> None:
    answer = whole(GOOD, prompt_eval_count=n_read)
    with OllamaServer([answer], context_length=allocated) as server:
        provider = OllamaProvider(host=server.url, num_ctx=2048, num_predict=256)
        request = replace(REQUEST, prompt=prompt)
        if is_cut:
            with pytest.raises(ProviderError, match=rf"it read {n_read}, .* raise `num_ctx`") as e:
                provider.complete(request)
            assert not e.value.transient
        else:
            assert provider.complete(request).details["context_length"] == (allocated or 2048)


def test_cut_prompt_where_the_context_is_unknown() -> None:
    cut = whole(GOOD, prompt_eval_count=2047)
    with OllamaServer([cut], faults={"/api/ps": Fault(404, "404 page not found")}) as server:
        provider = OllamaProvider(host=server.url, num_ctx=2048, num_predict=256)
        with pytest.raises(ProviderError, match="in a context of 2048"):
            provider.complete(REQUEST)


@pytest.mark.parametrize("too_long", [False, True])
def test_longest_answer(too_long: bool) -> None:
    body = json.dumps({"model": "gemma3:4b", "done": True, **whole(GOOD)})
    with OllamaServer([Fault(200, body.ljust(MAX_BODY + too_long))]) as server:
        provider = OllamaProvider(host=server.url)
        if too_long:
            with pytest.raises(ProviderError, match="over 4194304 bytes"):
                provider.complete(REQUEST)
        else:
            assert provider.complete(REQUEST).text == GOOD


def test_inside_a_running_event_loop() -> None:
    async def cell() -> str:
        return OllamaProvider(host=server.url).complete(REQUEST).text

    with OllamaServer([GOOD]) as server:
        assert asyncio.run(cell()) == GOOD


def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    provider = OllamaProvider(host=url)
    for call in (lambda: provider.complete(REQUEST), provider.check, provider.models):
        with pytest.raises(ProviderError, match=f"no Ollama server answers at {url}"):
            call()


def test_missing_model() -> None:
    with OllamaServer([GOOD], models=("llama3.2:1b", "qwen3:8b")) as server:
        provider = OllamaProvider("qwen3:4b", host=server.url)
        message = (
            r"no model 'qwen3:4b' \(did you mean 'qwen3:8b'\?\): get it with "
            r"`ollama pull qwen3:4b`; installed: 'llama3.2:1b', 'qwen3:8b'$"
        )
        for call in (lambda: provider.complete(REQUEST), provider.check):
            with pytest.raises(ProviderError, match=message):
                call()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((), "pull gemma3:4b`; installed: no model$"),
        (tuple(f"model:{i}" for i in range(11)), "'model:9', …$"),
    ],
)
def test_missing_model_among_none_or_many(models: tuple[str, ...], message: str) -> None:
    with OllamaServer(models=models) as server:
        with pytest.raises(ProviderError, match=message):
            OllamaProvider(host=server.url).check()


@pytest.mark.parametrize(
    "name",
    ["SMOLLM2:135m", "library/smollm2:135m", "registry.ollama.ai/library/smollm2:135m"],
)
def test_names_that_the_server_resolves(name: str) -> None:
    with OllamaServer([GOOD], models=("smollm2:135m",)) as server:
        provider = OllamaProvider(name, host=server.url)
        provider.check()
        details = provider.complete(REQUEST).details
    assert details["digest"] == server.digest("smollm2:135m")
    assert details["context_length"] == 8192


@pytest.mark.parametrize(
    ("models", "capabilities", "expected"),
    [
        (("a:1b", "b:1b"), {}, "a:1b"),
        (("a:1b", "b:1b"), {"a:1b": ["embedding"]}, "b:1b"),
        (("a:1b",), {"a:1b": ["embedding"]}, None),
        (("embed:1b", "a:1b"), {"embed:1b": None, "a:1b": None}, "a:1b"),
        (("gpt-oss:120b-cloud", "glm:cloud", "a:1b"), {}, "a:1b"),
        ((), {}, None),
    ],
)
def test_installed_chat_model(
    models: tuple[str, ...], capabilities: dict[str, list[str] | None], expected: str | None
) -> None:
    with OllamaServer(models=models, capabilities=capabilities) as server:
        assert OllamaProvider(host=server.url).installed_chat_model() == expected


@pytest.mark.parametrize(
    ("num_ctx", "trained", "n_read", "is_cut"),
    [
        (2048, 131_072, 1026, True),
        (8192, 2048, 1026, True),
        (8192, 2048, 2047, True),
        (8192, 131_072, 1026, False),
    ],
)
def test_cut_prompt_without_keep_alive(
    num_ctx: int, trained: int, n_read: int, is_cut: bool
) -> None:
    answer = whole(GOOD, prompt_eval_count=n_read)
    with OllamaServer([answer], trained=trained) as server:
        provider = OllamaProvider(host=server.url, num_ctx=num_ctx, keep_alive=0)
        if is_cut:
            with pytest.raises(ProviderError, match=f"in a context of {min(num_ctx, trained)}"):
                provider.complete(replace(REQUEST, prompt=LONG))
        else:
            assert provider.complete(replace(REQUEST, prompt=LONG)).text == GOOD


GRAMMAR = {"error": {"code": 400, "message": "failed to parse grammar", "type": "x"}}
BEFORE_SCHEMAS = "json: cannot unmarshal object into Go struct field ChatRequest.format"
# What the server refuses and how, what it is sent, and what the record says.
FORMATS: dict[str, tuple[Any, Fault, list[Any], dict[str, Any]]] = {
    "nothing": (lambda f: False, Fault(400), [PATTERNED], {}),
    "the pattern": (
        lambda f: f == PATTERNED,
        Fault(400, {"error": json.dumps(GRAMMAR)}),
        [PATTERNED, PLAIN],
        {"format": "json_schema", "pattern": False},
    ),
    "schemas": (
        lambda f: isinstance(f, dict),
        Fault(400, {"error": BEFORE_SCHEMAS}),
        [PATTERNED, PLAIN, "json"],
        {"format": "json_object"},
    ),
    "formats": (
        lambda f: f is not None,
        Fault(500, {"error": "format is not supported by this model"}),
        [PATTERNED, PLAIN, "json", None],
        {"format": "none"},
    ),
}


@pytest.mark.parametrize(
    ("refuses", "fault", "sent", "details"), FORMATS.values(), ids=FORMATS.keys()
)
def test_refused_formats(
    refuses: Any, fault: Fault, sent: list[Any], details: dict[str, Any]
) -> None:
    request = replace(REQUEST, schema=PATTERNED)
    with OllamaServer(lambda body: fault if refuses(body.get("format")) else GOOD) as server:
        provider = OllamaProvider(host=server.url)
        assert_steps_down_once(
            provider,
            request,
            GOOD,
            lambda: [body.get("format") for body in server.chats],
            sent,
            details,
        )


def test_refusal_of_every_format_is_an_error() -> None:
    fault = Fault(400, {"error": json.dumps(GRAMMAR)})
    with OllamaServer(lambda body: fault) as server:
        provider = OllamaProvider(host=server.url)
        for _ in range(2):
            with pytest.raises(ProviderError, match="HTTP 400: failed to parse grammar$"):
                provider.complete(REQUEST)
        assert len(server.chats) == 6  # Nothing was learnt from the first three.


@pytest.mark.parametrize(("own", "needed", "sent"), [(77, 99, 77), (99, 77, 77), (77, None, 77)])
def test_limit_of_a_reply(own: int, needed: int | None, sent: int) -> None:
    answer = whole(GOOD[:9], done_reason="length")
    with OllamaServer([answer]) as server:
        provider = OllamaProvider(host=server.url, num_predict=own)
        completion = provider.complete(replace(REQUEST, max_tokens=needed))
    assert server.chats[0]["options"]["num_predict"] == sent
    assert completion.details["options"]["num_predict"] == sent
    assert completion.problem == f"it was cut at num_predict={sent} tokens"


def test_one_client_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes a TLS context, which takes longer than the requests."""
    made = []

    class Counted(ollama.AsyncClient):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(ollama, "AsyncClient", Counted)
    with OllamaServer([GOOD]) as server:
        OllamaProvider(host=server.url).complete(REQUEST)
    assert len(server.requests) == 3
    assert len(made) == 1


@pytest.mark.parametrize("timeout", [1e10, 1e300, float("inf")])
def test_huge_timeout(timeout: float) -> None:
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider(host=server.url)
        assert provider.complete(replace(REQUEST, timeout=timeout)).text == GOOD


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, {"error": "boom"}),
        Fault(404, "404 page not found", "text/plain"),
        Fault(200, []),
        Fault(200, "null"),
        Fault(200, {"models": 3}),
        Fault(drop="before"),
        Fault(trickle="headers"),
        Fault(body=" " * 2**16, endless=True),
    ],
)
@pytest.mark.parametrize("path", ["/api/tags", "/api/ps"])
def test_reply_without_its_facts(fault: Fault, path: str) -> None:
    request = replace(REQUEST, timeout=0.5) if fault.trickle else REQUEST
    with OllamaServer([GOOD], faults={path: fault}) as server:
        completion = OllamaProvider(host=server.url).complete(request)
        digest = server.digest("gemma3:4b")
    assert completion.text == GOOD
    known = {"digest": digest, "context_length": 8192}
    missing = {"/api/tags": "digest", "/api/ps": "context_length"}[path]
    assert completion.details[missing] is None
    assert all(completion.details[name] in (None, fact) for name, fact in known.items())


@pytest.mark.parametrize(
    ("model", "served"),
    [
        ("gemma3:4b", ("gemma3:4b",)),
        ("gemma3", ("gemma3:latest",)),
        ("registry.local:5000/team/gemma3", ("registry.local:5000/team/gemma3:latest",)),
    ],
)
def test_check_of_a_model_that_is_there(model: str, served: tuple[str, ...]) -> None:
    with OllamaServer([GOOD], models=("other:1b", *served)) as server:
        provider = OllamaProvider(model, host=server.url)
        provider.check()
        assert server.chats == []
        assert provider.models().keys() == {"other:1b", *served}
        assert provider.complete(REQUEST).details["digest"] == server.digest(served[0])


@pytest.mark.parametrize(
    ("model", "served"), [("gemma3", "gemma3:4b"), ("gemma3:4b", "gemma3:latest")]
)
def test_tag_is_part_of_the_name(model: str, served: str) -> None:
    with OllamaServer(models=(served,)) as server:
        with pytest.raises(ProviderError, match=f"`ollama pull {model}`"):
            OllamaProvider(model, host=server.url).check()


HOSTS = (
    "http://127.0.0.1:{}",
    "127.0.0.1:{}",
    "http://localhost:{}",
    "localhost:{}",
    "0.0.0.0:{}",
    ":{}",
    "http://:{}",
    " http://127.0.0.1:{} ",
)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_no_proxy_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    with OllamaServer([GOOD]) as server:
        provider = OllamaProvider(host=host.format(server.port))
        assert provider.complete(REQUEST).text == GOOD


def test_environment_does_not_matter_on_this_machine() -> None:
    """The client's package makes a client of its own when it is imported."""
    bad = {
        "ALL_PROXY": "socks5://127.0.0.1:1",
        "OLLAMA_HOST": "http://user:p/secret@127.0.0.1:99999 ",
        "SSL_CERT_FILE": "/nowhere/at/all",
    }
    with OllamaServer([GOOD]) as server:
        code = (
            "from optuna_llm_catalyst import OllamaProvider\n"
            "from optuna_llm_catalyst.providers import CompletionRequest\n"
            "import os\n"
            "before = dict(os.environ)\n"
            f"provider = OllamaProvider(host={server.url!r})\n"
            "print(provider.complete(CompletionRequest('Write.', {}, seed=1)).text)\n"
            "assert os.environ == before\n"
        )
        assert run_python(code, env=bad).strip() == GOOD


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "cannot be reached: .*SOCKS.* proxies"),
        ("ALL_PROXY", "mailto://anna:secret@proxy", "cannot be reached: ValueError; check"),
        ("SSL_CERT_FILE", "/nowhere/at/all", "cannot be reached: .*; check .*SSL_CERT_FILE"),
        ("OLLAMA_API_KEY", "schlüssel-secret", "`OLLAMA_API_KEY` must be printable ASCII"),
    ],
)
def test_invalid_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ProviderError, match=message) as caught:
        OllamaProvider(host="http://ollama.invalid").check()
    assert "secret" not in str(caught.value)
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1:99999", "'127.0.0.1:99999' is not the URL of a server"),
        ("http://user:p/secret@127.0.0.1:1", "is not the URL of a server"),
        ("http://127.0.0.1:1/v1", "ends in /v1, where the server speaks OpenAI's protocol"),
        ("127.0.0.1:1/v1/", "ends in /v1"),
    ],
)
def test_invalid_ollama_host_is_named(
    monkeypatch: pytest.MonkeyPatch, host: str, message: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    with pytest.raises(ProviderError, match=message) as caught:
        OllamaProvider().check()
    assert "secret" not in str(caught.value)


def test_https_to_a_server_without_it() -> None:
    with OllamaServer() as server:
        provider = OllamaProvider(host=server.url.replace("http", "https"))
        with pytest.raises(ProviderError, match="cannot be reached: .*is `https` right") as caught:
            provider.check()
    assert not caught.value.transient


def test_unknown_certificate(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with OllamaServer() as server:
        server.use_tls(context)
        provider = OllamaProvider(host=server.url.replace("http", "https"))
        with pytest.raises(ProviderError, match="cannot be reached: .*certificate verify failed"):
            provider.check()


def test_client_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ollama", None)
    with pytest.raises(ProviderError, match=r"pip install 'optuna-llm-catalyst\[ollama\]'"):
        OllamaProvider().complete(REQUEST)


def test_proxy_for_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with OllamaServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with pytest.raises(ProviderError):
            OllamaProvider(host="http://ollama.invalid:11434").check()
    assert [request.path for request in proxy.requests] == ["http://ollama.invalid:11434/api/show"]


def test_ollama_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with OllamaServer([GOOD]) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        provider = OllamaProvider()
        assert provider.host == server.url
        assert provider.complete(REQUEST).text == GOOD
        elsewhere = OllamaProvider(host="http://127.0.0.1:1")
    assert elsewhere.host == "http://127.0.0.1:1"


@pytest.mark.parametrize("variable", ["", " "])
def test_default_host(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", variable)
    assert OllamaProvider().host == "http://127.0.0.1:11434"


@pytest.mark.parametrize(
    "host", ["http://[::1", "http://127.0.0.1:port", "127.0.0.1:99999", "http://\x00", "ftp://x"]
)
def test_host_that_is_no_url(host: str) -> None:
    provider = OllamaProvider(host=host)
    for call in (lambda: provider.complete(REQUEST), provider.check):
        with pytest.raises(ProviderError) as caught:
            call()
        assert host in str(caught.value) or repr(host) in str(caught.value)


KEY = "sk-not-for-everyone"


def keys_seen(server: OllamaServer) -> list[str | None]:
    """The keys of all requests; a header's name is as its sender wrote it."""
    lowered = [{k.lower(): v for k, v in r.headers.items()} for r in server.requests]
    return [headers.get("authorization") for headers in lowered]


@pytest.mark.parametrize("named_by", ["host", "OLLAMA_HOST", ""])
def test_key_goes_to_named_hosts_only(monkeypatch: pytest.MonkeyPatch, named_by: str) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    with OllamaServer([GOOD]) as server:
        monkeypatch.setattr(ollama_module, "_DEFAULT_URL", "http://127.0.0.1:1")
        if named_by == "OLLAMA_HOST":
            monkeypatch.setenv("OLLAMA_HOST", server.url)
        if not named_by:
            monkeypatch.setattr(ollama_module, "_DEFAULT_URL", server.url)
        provider = OllamaProvider(host=server.url if named_by == "host" else None)
        provider.complete(REQUEST)
        provider.check()
        provider.server_version()
        provider.model_context_length()
    assert len(server.requests) == 6
    assert set(keys_seen(server)) == {f"Bearer {KEY}" if named_by else None}
    assert KEY not in repr(provider.__dict__)
    assert KEY.encode() not in pickle.dumps(provider)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    with OllamaServer([GOOD]) as elsewhere:
        moved = {
            path: Fault(status, headers={"Location": f"{elsewhere.url}{path}"})
            for path in ("/api/chat", "/api/tags", "/api/ps", "/api/version", "/api/show")
        }
        with OllamaServer(faults=moved) as server:
            provider = OllamaProvider(host=server.url)
            for call in (
                lambda: provider.complete(REQUEST),
                provider.check,
                provider.server_version,
                provider.model_context_length,
            ):
                with pytest.raises(ProviderError, match=f"HTTP {status}") as caught:
                    call()
                assert not caught.value.transient
        assert elsewhere.requests == []


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret ", "sk-\x1bsecret", "sk-secret-é"])
def test_invalid_key_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    with OllamaServer([GOOD]) as server:
        try:
            OllamaProvider(host=server.url).complete(REQUEST)
        except ProviderError as error:
            assert "secret" not in str(error)
            assert "is not the URL" not in str(error)
            assert not error.transient


@pytest.mark.parametrize(
    "host",
    [
        "http://user:secret@127.0.0.1:{}",
        "https://user:secret@127.0.0.1:{}",
        "user:secret@127.0.0.1:{}",
        "http://secret@127.0.0.1:{}",
        "http://user:p@secret@127.0.0.1:{}",
        "http://user:p/secret@127.0.0.1:{}",
        "http://user:secret/word@127.0.0.1:{}",
        "http://user:secret@127.0.0.1:port{}",
        "http://user:secret@[::1:{}",
    ],
)
def test_credentials_in_the_url_are_not_shown(host: str) -> None:
    fault = Fault(503, {"error": "busy"})
    with OllamaServer(models=(), faults={"/api/version": fault}) as server:
        provider = OllamaProvider(host=host.format(server.port))
        said = [provider.name, provider.host]
        for call in (
            lambda: provider.complete(REQUEST),
            provider.check,
            provider.server_version,
        ):
            with pytest.raises(ProviderError) as caught:
                call()
            said.append(str(caught.value))
    assert not [text for text in said if "secret" in text]


def test_version_and_context_length() -> None:
    with OllamaServer() as server:
        provider = OllamaProvider(host=server.url)
        assert provider.server_version() == "0.32.9"
        assert provider.model_context_length() == 131072


@pytest.mark.parametrize(
    ("info", "length"),
    [
        ({"general.architecture": "llama", "llama.context_length": 2048}, 2048),
        ({"general.architecture": "llama", "gemma3.context_length": 2048}, None),
        ({"general.architecture": "llama", "llama.context_length": "2048"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_unknown_context_length(info: dict[str, Any] | None, length: int | None) -> None:
    fault = Fault(200, {"model_info": info})
    with OllamaServer(faults={"/api/show": fault}) as server:
        assert OllamaProvider(host=server.url).model_context_length() == length


@pytest.mark.parametrize(
    "fault",
    [
        Fault(404, "404 page not found"),
        Fault(200, "Welcome!", "text/html"),
        Fault(200, []),
        Fault(200, {}),
        Fault(200, "null"),
        Fault(drop="before"),
    ],
)
def test_server_without_a_version(fault: Fault) -> None:
    with OllamaServer(faults={"/api/version": fault}) as server:
        with pytest.raises(ProviderError, match="127.0.0.1"):
            OllamaProvider(host=server.url).server_version()


def test_context_length_of_a_missing_model() -> None:
    with OllamaServer(models=()) as server:
        with pytest.raises(ProviderError, match="`ollama pull gemma3:4b`"):
            OllamaProvider(host=server.url).model_context_length()


def test_copies_and_pickles() -> None:
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
        ({"temperature": -0.1}, "`temperature` must be at least 0, got -0.1"),
        ({"num_predict": 0}, "`num_predict` must be positive .* got 0 and 8192"),
        ({"num_predict": 8192}, "below `num_ctx`, got 8192 and 8192"),
        ({"num_ctx": 512}, "below `num_ctx`, got 1024 and 512"),
        ({"keep_alive": "-1"}, "`keep_alive` must be .* got '-1'; the number -1 keeps"),
        ({"keep_alive": "for ever"}, '`keep_alive` must be .* as in "30m", got'),
        ({"keep_alive": ""}, "`keep_alive` must be a number of seconds or a duration"),
        ({"keep_alive": "30"}, "`keep_alive` must be a number of seconds or a duration"),
    ],
)
def test_invalid_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OllamaProvider(**arguments)


def test_study() -> None:
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
        proposal = records.load(trial, "proposal", dict[str, Any])
        assert proposal is not None
        assert proposal["meta_prompt"] == asked
        (ask,) = proposal["attempts"]
        assert ask["seed"] == body["options"]["seed"]
        assert ask["digest"] == server.digest("gemma3:4b")
        assert ask["problem"] == ""
        assert proposal["failure"] is None
    seeds = {body["options"]["seed"] for body in server.chats}
    assert len(seeds) == 4
