from __future__ import annotations

import copy
from dataclasses import replace
import json
import pickle
import re
import socket
from typing import Any

import pytest

from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.proposers import reply as reply_format
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers.openai_compatible import OpenAICompatibleProvider
from tests.ollama_server import Fault
from tests.ollama_server import Reply
from tests.openai_server import choice
from tests.openai_server import Endless
from tests.openai_server import OpenAIServer
from tests.openai_server import Redirect
from tests.providers.schemas import assert_steps_down_once
from tests.providers.schemas import PATTERNED
from tests.providers.schemas import PLAIN
from tests.toy_stage import reply
from tests.toy_stage import run_python


MODEL = "qwen3-4b"
FILE = "models/smollm2-135m.gguf"
REQUEST = CompletionRequest(
    "Write a prompt.", reply_format.schema(2), seed=17, trial_number=3, timeout=10
)
GOOD = reply("calm answer quick", "topic label clear")
SECRETS = {
    "OPENAI_API_KEY": "environment-key",
    "OPENAI_ADMIN_KEY": "environment-admin-key",
    "OPENAI_ORG_ID": "environment-org",
    "OPENAI_PROJECT_ID": "environment-project",
    "OPENAI_WEBHOOK_SECRET": "environment-webhook",
    "OPENAI_CUSTOM_HEADERS": "Authorization: Bearer environment\nX-Gateway-Key: environment",
    "OPENAI_BASE_URL": "http://127.0.0.1:1/environment",
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer's machine sets for OpenAI and for proxies is not part of the tests."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def provider_of(server: OpenAIServer, **options: Any) -> OpenAICompatibleProvider:
    return OpenAICompatibleProvider(MODEL, base_url=server.url, **options)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_request() -> None:
    with OpenAIServer([GOOD]) as server:
        provider_of(server).complete(REQUEST)
    (body,) = server.chats
    assert body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Write a prompt."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "prompts", "schema": REQUEST.schema},
        },
        "max_tokens": 1024,
        "temperature": 0.8,
        "seed": 17,
    }


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"num_predict": 77}, "max_tokens", 77),
        ({"temperature": 0.0}, "temperature", 0.0),
        ({"temperature": 1}, "temperature", 1),
    ],
)
def test_argument_reaches_the_server(arguments: dict[str, Any], field: str, value: float) -> None:
    with OpenAIServer([GOOD]) as server:
        provider_of(server, **arguments).complete(REQUEST)
    assert server.chats[0][field] == value


def test_seed_of_zero() -> None:
    with OpenAIServer([GOOD]) as server:
        provider_of(server).complete(CompletionRequest("Write a prompt.", {}, seed=0))
    assert server.chats[0]["seed"] == 0


def test_completion() -> None:
    answer = {"choices": [choice(GOOD)], "model": "Qwen/Qwen3-4B", "system_fingerprint": "b6500"}
    with OpenAIServer([answer]) as server:
        completion = provider_of(server).complete(REQUEST)
    assert (completion.text, completion.problem) == (GOOD, "")
    assert completion.model == "Qwen/Qwen3-4B"
    assert completion.details == {
        "options": {"num_predict": 1024, "temperature": 0.8, "seed": 17},
        "finish_reason": "stop",
        "prompt_tokens": 120,
        "reply_tokens": 30,
        "system_fingerprint": "b6500",
    }
    assert json.loads(json.dumps(completion.details)) == completion.details


def test_name_server_and_limit() -> None:
    provider = OpenAICompatibleProvider(
        MODEL, base_url="http://127.0.0.1:8000/v1/", num_ctx=4096, num_predict=512
    )
    assert provider.name == "openai:qwen3-4b"
    assert provider.base_url == "http://127.0.0.1:8000/v1"
    assert provider.max_prompt_tokens == 3584


def test_text_of_any_script() -> None:
    text = reply("ruhige Antwort é", "落ち着いた 🙂", 'quotes " and \\')
    with OpenAIServer(lambda body: body["messages"][0]["content"]) as server:
        request = CompletionRequest(text, {}, seed=1)
        assert provider_of(server).complete(request).text == text


USABLE: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "cut": ([choice(GOOD[:20], "length")], GOOD[:20], "it was cut at max_tokens=1024", {}),
    "filtered": ([choice("", "content_filter")], "", "it ended with 'content_filter'", {}),
    "broken off": ([choice(GOOD, "abort")], GOOD, "it ended with 'abort'", {}),
    "no reason": ([choice(GOOD, None)], GOOD, "", {"finish_reason": None}),
    "empty": ([choice("")], "", "", {}),
    "no content": ([choice(None)], "", "", {}),
    "thoughts and an answer": ([choice(GOOD, reasoning_content="hm")], GOOD, "", {}),
    "only thoughts": (
        [choice(None, reasoning_content=GOOD)],
        GOOD,
        "",
        {"reply_from": "thinking"},
    ),
    "only thoughts, newer": ([choice("\n", reasoning=GOOD)], GOOD, "", {"reply_from": "thinking"}),
    "thoughts that were cut": (
        [choice("", "length", reasoning="hm")],
        "hm",
        "it was cut at max_tokens=1024",
        {"reply_from": "thinking"},
    ),
    "blank thoughts": ([choice("", reasoning=" ", reasoning_content=3)], "", "", {}),
    "second choice": ([choice(GOOD), choice("other")], GOOD, "", {}),
}


@pytest.mark.parametrize(
    ("choices", "text", "problem", "details"), USABLE.values(), ids=USABLE.keys()
)
def test_problem_that_the_server_tells(
    choices: Any, text: str, problem: str, details: dict[str, Any]
) -> None:
    with OpenAIServer([{"choices": choices}]) as server:
        completion = provider_of(server).complete(REQUEST)
    assert (completion.text, completion.problem) == (text, problem)
    assert {name: completion.details[name] for name in details} == details
    assert ("reply_from" in completion.details) == ("reply_from" in details)


@pytest.mark.parametrize(
    "fields",
    [
        {"usage": None},
        {"usage": []},
        {"usage": {"prompt_tokens": "many", "completion_tokens": None}},
        {"usage": {}, "model": None, "system_fingerprint": 3},
    ],
)
def test_missing_facts(fields: dict[str, Any]) -> None:
    with OpenAIServer([{"choices": [choice(GOOD)], **fields}]) as server:
        completion = provider_of(server).complete(REQUEST)
    assert (completion.text, completion.model) == (GOOD, MODEL)
    assert completion.details["prompt_tokens"] is completion.details["reply_tokens"] is None
    assert "system_fingerprint" not in completion.details


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


def body(**fields: Any) -> Fault:
    return Fault(200, {"model": MODEL, **fields})


UNUSABLE = "gave no usable answer"
FAULTS: dict[str, tuple[Reply, str]] = {
    "reset before a byte": (Fault(drop="before"), "broke the connection: "),
    "reset inside the body": (
        Fault(body={"choices": []}, drop="inside"),
        "broke the connection: ",
    ),
    "reset inside an error": (Fault(500, error("boom"), drop="inside"), "broke the connection: "),
    "400": (Fault(400, error("bad temperature")), "HTTP 400: bad temperature$"),
    "400 for the prompt": (
        Fault(400, error("maximum context length is 4096 tokens")),
        "HTTP 400: maximum .*`num_ctx` must be the context length",
    ),
    "401": (Fault(401, {"error": "Unauthorized"}), "HTTP 401: Unauthorized .is `api_key` the key"),
    "403": (Fault(403, {"message": "no"}), "HTTP 403: no .is `api_key` the key"),
    "404": (
        Fault(404, {"detail": "Not Found"}),
        r"HTTP 404: Not Found .*`curl http://127.*/models",
    ),
    "408": (Fault(408, "late", "text/plain"), "HTTP 408: late"),
    "422": (Fault(422, {"detail": [{"loc": ["seed"]}]}), 'HTTP 422: {"detail"'),
    "429": (Fault(429, error("slow down")), "HTTP 429: slow down"),
    "500": (Fault(500, error("engine is dead")), "HTTP 500: engine is dead"),
    "502 with a page": (
        Fault(502, "<html>Bad\ngateway</html>", "text/html"),
        "502: <html>Bad gate",
    ),
    "503 while loading": (Fault(503, error("Loading model")), "HTTP 503: Loading model"),
    "504 without a body": (Fault(504), "HTTP 504: "),
    "error body is a list": (Fault(500, ["boom"]), r'HTTP 500: \["boom"\]'),
    "error body is a string": (Fault(500, '"boom"'), "HTTP 500: boom"),
    "error body is null": (Fault(500, "null"), "HTTP 500: null"),
    "error body without end": (Fault(500, "[" * 100_000), r"HTTP 500: \[\["),
    "error body is no UTF-8": (Fault(500, b"\xff\xfe"), "HTTP 500: "),
    "200 with a page": (Fault(200, "<html>Sign in</html>", "text/html"), f"{UNUSABLE}.*Sign in"),
    "200 with an error": (Fault(200, error("no credits")), f"{UNUSABLE}: .*no credits"),
    "200 without a body": (Fault(200), UNUSABLE),
    "cut JSON": (Fault(200, json.dumps({"choices": [choice(GOOD)]})[:-9]), UNUSABLE),
    "JSON is a list": (Fault(200, [choice(GOOD)]), UNUSABLE),
    "JSON is a string": (Fault(200, '"calm"'), UNUSABLE),
    "JSON is null": (Fault(200, "null"), UNUSABLE),
    "JSON without end": (Fault(200, "[" * 100_000), UNUSABLE),
    "invalid UTF-8": (Fault(200, b'{"choices": "\xff\xfe"}'), UNUSABLE),
    "no choices": (body(), f'{UNUSABLE}: "choices" is missing'),
    "choices is null": (body(choices=None), '"choices" must be a list, got None'),
    "choices is empty": (body(choices=[]), f"{UNUSABLE}: no choices"),
    "choices is a string": (body(choices="calm"), "\"choices\" must be a list, got 'calm'"),
    "choice is null": (body(choices=[None]), UNUSABLE),
    "no message": (
        body(choices=[{"index": 0}]),
        rf'{UNUSABLE}: "choices\[0\].message" is missing',
    ),
    "message is null": (body(choices=[{"message": None}]), UNUSABLE),
    "message is a string": (body(choices=[{"message": "calm"}]), UNUSABLE),
    "content is a number": (body(choices=[choice(3)]), 'content" must be a text or null, got 3'),
    "content is in parts": (
        body(choices=[choice([{"text": GOOD}])]),
        'content" must be a text or null',
    ),
    "reason is a list": (
        body(choices=[choice(GOOD, [[]])]),
        'finish_reason" must be a text or null',
    ),
    "cut before an answer": (
        {"choices": [choice(" ", "length")]},
        r"openai:qwen3-4b used up max_tokens=1024 without an answer: raise `num_predict`",
    ),
}
TRANSIENT = {name for name in FAULTS if name[:3] in ("408", "429", "502", "503", "504", "res")}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_a_provider_error(name: str) -> None:
    fault, message = FAULTS[name]
    with OpenAIServer([fault, GOOD]) as server:
        provider = provider_of(server)
        with pytest.raises(ProviderError, match=message) as caught:
            provider.complete(REQUEST)
        assert caught.value.transient == (name in TRANSIENT)
        assert len(server.chats) == 1
        assert provider.complete(REQUEST).text == GOOD


SLOW = {
    "silence": Fault(delay=30),
    "a trickle": Endless(200, " ", pause=0.02),
    "a trickle under an error": Endless(500, " ", pause=0.02),
}


@pytest.mark.parametrize("fault", SLOW.values(), ids=SLOW.keys())
def test_deadline(fault: Fault) -> None:
    request = CompletionRequest("Write a prompt.", {}, seed=1, timeout=0.4)
    with OpenAIServer([fault]) as server:
        with pytest.raises(ProviderError, match=r"did not answer within 0\.4 seconds") as caught:
            provider_of(server).complete(request)
    assert not caught.value.transient


@pytest.mark.parametrize("status", [200, 500])
def test_body_without_end(status: int) -> None:
    with OpenAIServer([Endless(status, b" " * 2**18)]) as server:
        with pytest.raises(ProviderError, match="answer is over 4194304 bytes long"):
            provider_of(server).complete(REQUEST)


def test_no_packed_body_is_requested() -> None:
    with OpenAIServer([GOOD]) as server:
        provider_of(server).complete(REQUEST)
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    provider = OpenAICompatibleProvider(MODEL, base_url=url)
    for call in (lambda: provider.complete(REQUEST), provider.check, provider.models):
        with pytest.raises(ProviderError, match=f"no server answers at {url}") as caught:
            call()
        assert caught.value.transient


@pytest.mark.parametrize("api_key", [None, "given-key"])
def test_environment_keys_go_to_no_server(
    monkeypatch: pytest.MonkeyPatch, api_key: str | None
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with OpenAIServer([GOOD]) as server:
        provider = provider_of(server, api_key=api_key)
        assert provider.complete(REQUEST).text == GOOD
        provider.check()
    assert [request.path for request in server.requests] == [
        "/v1/chat/completions",
        "/v1/models",
    ]
    for request in server.requests:
        key = f"Bearer {api_key}" if api_key else None
        assert request.headers.get("Authorization") == key
        assert "environment" not in str(request).lower()
        assert {name.lower() for name in request.headers} <= {
            *("accept", "accept-encoding", "authorization", "connection"),
            *("content-length", "content-type", "host", "user-agent"),
            "x-stainless-raw-response",
        }


def test_key_that_the_server_repeats() -> None:
    with OpenAIServer([Fault(401, error("invalid key given-key"))]) as server:
        with pytest.raises(ProviderError, match=r"invalid key \*\*\*") as caught:
            provider_of(server, api_key="given-key").complete(REQUEST)
    assert "given-key" not in str(caught.value)


@pytest.mark.parametrize("echo", ["s%40cret", "s@cret", "Basic YW5uYTpzQGNyZXQ="])
@pytest.mark.parametrize("status", [200, 401])
def test_password_that_the_server_repeats(status: int, echo: str) -> None:
    with OpenAIServer([Fault(status, error(f"refused {echo}, sorry"))]) as server:
        provider = OpenAICompatibleProvider(
            MODEL, base_url=server.url.replace("//", "//anna:s%40cret@")
        )
        with pytest.raises(ProviderError, match=r"refused (Basic )?\*\*\*, sorry"):
            provider.complete(REQUEST)


def test_credentials_in_the_url() -> None:
    with OpenAIServer([GOOD, Fault(500)]) as server:
        url = server.url.replace("//", "//anna:s%40cret@")
        provider = OpenAICompatibleProvider(MODEL, base_url=url)
        assert provider.complete(REQUEST).text == GOOD
        assert server.requests[0].headers["Authorization"] == "Basic YW5uYTpzQGNyZXQ="
        assert provider.base_url == server.url
        assert "cret" not in repr(vars(provider))
        with pytest.raises(ProviderError) as caught:
            provider.complete(REQUEST)
    assert server.url in str(caught.value)
    assert not any(word in str(caught.value) for word in ("anna", "cret"))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed(status: int) -> None:
    with OpenAIServer([GOOD]) as other:
        with OpenAIServer([Redirect(status, location=other.url)]) as server:
            with pytest.raises(ProviderError, match=f"HTTP {status}.* where it redirects to"):
                provider_of(server, api_key="given-key").complete(REQUEST)
    assert other.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    with OpenAIServer([GOOD]) as server:
        url = f"http://{host}:{server.port}/v1"
        assert OpenAICompatibleProvider(MODEL, base_url=url).complete(REQUEST).text == GOOD


def test_proxy_for_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with OpenAIServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(ProviderError):
            OpenAICompatibleProvider(MODEL, base_url="http://vllm.invalid/v1").check()
    assert [request.path for request in proxy.requests] == ["http://vllm.invalid/v1/models"]


def test_check_of_a_model_that_is_there() -> None:
    with OpenAIServer(models=("other", MODEL)) as server:
        provider = provider_of(server)
        provider.check()
        assert provider.models() == ["other", MODEL]
        assert server.chats == []


def test_missing_model() -> None:
    with OpenAIServer([GOOD], models=("other", "third")) as server:
        provider = provider_of(server)
        with pytest.raises(ProviderError, match="no model 'qwen3-4b'; .* 'other', 'third'"):
            provider.check()
        with pytest.raises(ProviderError, match="no model 'qwen3-4b'.*/v1/models` lists"):
            provider.complete(REQUEST)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (FILE, ""),
        ("", f"the server at .*/v1 has one model: '{FILE}' is used, its only one"),
        (MODEL, f"has no model '{MODEL}': '{FILE}' is used, its only one"),
    ],
)
def test_the_only_model_of_a_server(model: str, note: str) -> None:
    """llama.cpp's server has one, under a file's name."""
    with OpenAIServer([GOOD], models=(FILE,)) as server:
        provider = OpenAICompatibleProvider(model, base_url=server.url)
        provider.check()
        assert (provider.model, provider.name) == (FILE, f"openai:{FILE}")
        assert re.search(note, provider.note) and bool(provider.note) == bool(note)
        assert provider.complete(REQUEST).text == GOOD


def test_first_request_finds_the_only_model() -> None:
    with OpenAIServer([GOOD], models=(FILE,)) as server:
        provider = OpenAICompatibleProvider(base_url=server.url)
        assert provider.complete(REQUEST).model == FILE
    with OpenAIServer(models=("a", "b")) as server:
        provider = OpenAICompatibleProvider(base_url=server.url)
        with pytest.raises(ProviderError, match="needs the name of a model; its models: 'a', 'b'"):
            provider.complete(REQUEST)


def response_format(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "prompts", "schema": schema}}


LLAMA_CPP_PYTHON = (
    "[{'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), 'msg': \"Input should "
    "be 'text' or 'json_object'\", 'input': 'json_schema'}]"
)
# What the server refuses and how, what it is sent, and what the record says.
FORMATS: dict[str, tuple[Any, Fault, list[Any], dict[str, Any]]] = {
    "nothing": (lambda f: False, Fault(400), [response_format(PATTERNED)], {}),
    "the pattern": (
        lambda f: f == response_format(PATTERNED),
        Fault(400, {"error": {"message": "Unsupported schema keyword: pattern", "code": 400}}),
        [response_format(PATTERNED), response_format(PLAIN)],
        {"format": "json_schema", "pattern": False},
    ),
    "json_schema, as llama.cpp's Python server": (
        lambda f: f and f["type"] == "json_schema",
        Fault(500, {"error": {"message": LLAMA_CPP_PYTHON, "code": None}}),
        [
            *(response_format(PATTERNED), response_format(PLAIN)),
            {"type": "json_object", "schema": PLAIN},
        ],
        {"format": "json_object"},
    ),
    "response_format": (
        lambda f: f,
        Fault(422, {"detail": [{"loc": ["body", "response_format"], "msg": "extra field"}]}),
        [
            *(response_format(PATTERNED), response_format(PLAIN)),
            {"type": "json_object", "schema": PLAIN},
            None,
        ],
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
    answer: Any = lambda body: fault if refuses(body.get("response_format")) else GOOD  # noqa: E731
    with OpenAIServer(answer) as server:
        provider = provider_of(server)
        assert_steps_down_once(
            provider,
            request,
            GOOD,
            lambda: [body.get("response_format") for body in server.chats],
            sent,
            details,
        )


@pytest.mark.parametrize(("own", "needed", "sent"), [(77, 99, 77), (99, 77, 77), (77, None, 77)])
def test_limit_of_a_reply(own: int, needed: int | None, sent: int) -> None:
    with OpenAIServer([{"choices": [choice(GOOD[:9], "length")]}]) as server:
        provider = provider_of(server, num_predict=own)
        completion = provider.complete(replace(REQUEST, max_tokens=needed))
    assert server.chats[0]["max_tokens"] == sent
    assert completion.details["options"]["num_predict"] == sent
    assert completion.problem == f"it was cut at max_tokens={sent}"


@pytest.mark.parametrize(
    ("message", "limits"),
    [
        ({"content": "", "reasoning": "Let me see"}, [77, 999]),
        ({"content": "<think>Let me see"}, [77, 999]),
        ({"content": GOOD[:9]}, [77, 77]),
    ],
)
def test_model_that_thinks_gets_all_room_once_it_is_known(message: Any, limits: list[int]) -> None:
    with OpenAIServer([{"choices": [choice(finish_reason="length", **message)]}, GOOD]) as server:
        provider = provider_of(server, num_predict=999)
        for _ in limits:
            provider.complete(replace(REQUEST, max_tokens=77))
    assert [body["max_tokens"] for body in server.chats] == limits


@pytest.mark.parametrize("timeout", [1e10, 1e300, float("inf")])
def test_huge_timeout(timeout: float) -> None:
    with OpenAIServer([GOOD]) as server:
        assert provider_of(server).complete(replace(REQUEST, timeout=timeout)).text == GOOD


def test_https_to_a_server_without_it() -> None:
    with OpenAIServer() as server:
        url = server.url.replace("http", "https")
        provider = OpenAICompatibleProvider(MODEL, base_url=url)
        with pytest.raises(ProviderError, match="cannot be reached: .*is `https` right") as caught:
            provider.check()
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "mailto://proxy"), ("SSL_CERT_FILE", "/nowhere/at/all")],
)
def test_invalid_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ProviderError, match=f"cannot be reached: .*; check .*{name}"):
        OpenAICompatibleProvider(MODEL, base_url="http://vllm.invalid/v1").check()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(404, "404 page not found", "text/plain"), "does `base_url` lack its `/v1`"),
        (Fault(200, "<html>"), UNUSABLE),
        (Fault(200, []), UNUSABLE),
        (Fault(200, {"data": None}), UNUSABLE),
        (Fault(200, {"data": [{"id": 3}]}), r'"data\[0\].id" must be a text, got 3'),
        (Fault(200, {"data": []}), "its models: none at all"),
    ],
)
def test_unusable_list_of_models(fault: Fault, message: str) -> None:
    with OpenAIServer(faults={"/v1/models": fault}) as server:
        with pytest.raises(ProviderError, match=message):
            provider_of(server).check()


def test_copies_and_pickles() -> None:
    with OpenAIServer([GOOD] * 3) as server:
        provider = provider_of(server, api_key="given-key", num_predict=77)
        for twin in (provider, copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
            assert twin.complete(REQUEST).text == GOOD
    first, *others = [(request.body, request.headers) for request in server.requests]
    assert others == [first, first]


GOOD_URL = "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_predict": 0}, "`num_predict` must be positive .* got 0 and 8192"),
        ({"num_ctx": 512}, "below `num_ctx`, got 1024 and 512"),
        ({"temperature": -0.1}, "`temperature` must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0, got nan"),
        ({"api_key": ""}, "`api_key` must be printable ASCII .* got 0 characters"),
        ({"api_key": "two\nlines"}, "`api_key` must be printable ASCII .* got 9 characters"),
        ({"api_key": "schlüssel"}, "`api_key` must be printable ASCII"),
        ({"base_url": ""}, "`base_url` must be the URL of a server .* got ''"),
        ({"base_url": "127.0.0.1:8000/v1"}, "got '127.0.0.1:8000/v1'"),
        ({"base_url": "ftp://127.0.0.1/v1"}, "got 'ftp://127.0.0.1/v1'"),
        ({"base_url": "http:///v1"}, "`base_url` must be"),
        ({"base_url": "http://[::1/v1"}, "`base_url` must be"),
        ({"base_url": "http://127.0.0.1:port/v1"}, "`base_url` must be"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "`base_url` must be"),
        ({"base_url": "http://my server/v1"}, "`base_url` must be"),
        ({"base_url": "http://anna:secret@[::1/v1"}, r"got 'http://\[::1/v1'"),
        ({"base_url": "http://anna:sec/secret@host/v1"}, "got 'http://host/v1'"),
        ({"base_url": "anna:secret@host/v1"}, "got 'host/v1'"),
    ],
)
def test_invalid_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OpenAICompatibleProvider(**({"model": MODEL, "base_url": GOOD_URL} | arguments))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://a..b/v1", "http://xn--/v1", "http://[v1.x]/v1"])
def test_url_of_no_server(url: str) -> None:
    with pytest.raises(ProviderError):
        OpenAICompatibleProvider(MODEL, base_url=url).check()


def test_client_is_not_installed() -> None:
    code = """
import sys
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.openai_compatible import OpenAICompatibleProvider
assert "openai" not in sys.modules
sys.modules["openai"] = None
try:
    OpenAICompatibleProvider("m", base_url="http://127.0.0.1:1/v1").check()
except ProviderError as error:
    print(error)
"""
    assert "pip install 'optuna-llm-catalyst[openai]'" in run_python(code)
