"""What holds for any server, without one."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers.ollama_client import server_of
from optuna_llm_catalyst.providers.servers import in_format
from optuna_llm_catalyst.providers.servers import is_loopback
from optuna_llm_catalyst.providers.servers import message_of
from optuna_llm_catalyst.providers.servers import ReplyFormat
from tests.providers.schemas import PATTERNED
from tests.providers.schemas import PLAIN


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:11434", True),
        ("https://localhost/ollama", True),
        ("127.0.0.1", True),
        ("127.8.8.8:11434", True),
        ("0.0.0.0", True),
        ("[::1]:11434", True),
        ("http://user:word@127.0.0.1:11434", True),
        # What is left out is this machine, and so is what a server is told to listen on.
        (":11434", True),
        ("http://:11434", True),
        ("[::]:11434", True),
        ("192.168.0.7", False),
        ("ollama.example.com", False),
        ("localhost.example.com", False),
        ("http://127.0.0.1@example.com", False),
        ("http://example.com/127.0.0.1", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "[::1]"),
        ("0:0:0:0:0:0:0:1", "[::1]"),
        ("[::1]:11434", "[::1]:11434"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_ollama_host_as_people_write_it(host: str, url: str) -> None:
    assert server_of(host).url == url


@given(
    schema=st.sampled_from([PATTERNED, PLAIN, {}]),
    refused=st.sets(st.integers(0, 3)),
    first=st.integers(0, 3),
)
def test_strictest_format_that_is_taken(
    schema: dict[str, Any], refused: set[int], first: int
) -> None:
    """All formats from the first one on are tried, no request is made twice."""
    sent: list[ReplyFormat] = []
    request = CompletionRequest("Write a prompt.", schema, seed=1, timeout=60)

    def send(reply_format: ReplyFormat, seconds: float) -> ReplyFormat:
        assert 0 < seconds <= 60
        sent.append(reply_format)
        number = ["json_schema", "json_object", "none"].index(reply_format.kind)
        number += bool(number) or "pattern" in reply_format.details
        if number in refused:
            raise ProviderError("no", status=400, said="unknown response_format")
        return reply_format

    try:
        taken, details, number = in_format(request, first, send)
    except ProviderError:
        assert sent[-1].kind == "none"
    else:
        assert taken is sent[-1] and number >= first
        assert details == taken.details
        assert in_format(request, number, send) == (taken, details, number)
        sent.pop()
    requests = [(reply_format.kind, str(reply_format.schema)) for reply_format in sent]
    assert len(set(requests)) == len(requests)
    assert all("pattern" not in str(f.schema) for f in sent if f.details)


@pytest.mark.parametrize(
    ("status", "said", "n_sent"),
    [
        (400, "unknown response_format.type", 3),
        (422, "no field `format`", 3),
        (500, "failed to parse grammar", 3),
        (400, 'invalid format: "yaml"; expected "json" or a valid JSON Schema object', 3),
        (400, "json: cannot unmarshal object into Go struct field ChatRequest.format", 3),
        (400, "context length exceeded; check the request format", 1),
        (400, "bad temperature", 1),
        (500, "for more information see the log", 1),
        (404, "no such schema", 1),
        (503, "the schema is loading", 1),
    ],
)
def test_refusal_of_a_format_is_known_by_its_words(status: int, said: str, n_sent: int) -> None:
    sent = []

    def send(reply_format: ReplyFormat, seconds: float) -> None:
        sent.append(reply_format)
        raise ProviderError(f"http://format-schema: {said}", status=status, said=said)

    with pytest.raises(ProviderError):
        in_format(CompletionRequest("Write a prompt.", PLAIN, seed=1), 0, send)
    assert len(sent) == n_sent


def test_refusal_is_raised_where_no_time_is_left() -> None:
    limits = []

    def send(reply_format: ReplyFormat, seconds: float) -> None:
        limits.append(seconds)
        raise ProviderError("no such format", status=400, said="no such 'format'")

    with pytest.raises(ProviderError, match="no such format"):
        in_format(CompletionRequest("Write a prompt.", PLAIN, seed=1, timeout=-1), 0, send)
    assert limits == [0.0]


def nested(message: str, depth: int) -> str:
    return nested(json.dumps({"error": message}), depth - 1) if depth else message


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_message_within_messages(depth: int) -> None:
    assert message_of(nested("out of ideas", depth)) == "out of ideas"
