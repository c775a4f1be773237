"""Ollama's official client, for one server and without what it takes from the environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
import ipaddress
import os
import sys
import threading
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.servers import check_key
from optuna_llm_catalyst.providers.servers import is_http_url
from optuna_llm_catalyst.providers.servers import METADATA_TIMEOUT_S
from optuna_llm_catalyst.providers.servers import Server


if TYPE_CHECKING:
    import ollama

T = TypeVar("T")
Work = Callable[["ollama.AsyncClient"], Coroutine[Any, Any, T]]
_IMPORT = threading.Lock()
_VARIABLES = {"OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR"}


def server_of(host: str) -> Server:
    """The server of a host as people write it, such as ``127.0.0.1:11434``, ``::1`` or a URL."""
    with suppress(ValueError):
        host = f"[{ipaddress.IPv6Address(host)}]"
    return Server("Ollama server", host)


def run(server: Server, work: Work[T], timeout: float, *, sends_key: bool) -> T:
    """Does some work with a client, within so many seconds, or raises a ProviderError."""
    key = os.environ.get("OLLAMA_API_KEY") or None
    try:
        check_key("OLLAMA_API_KEY", key)
    except ValueError as error:
        raise ProviderError(str(error)) from None
    _check_url(server)
    server = replace(server, key=key if sends_key else None)
    return server.exchange(lambda: _client(server), work, timeout)


async def digests(client: ollama.AsyncClient) -> dict[str, str]:
    """The models of a server, the newest first: name to digest."""
    listed = (await client.list()).models
    return {model.model: model.digest or "" for model in listed if model.model}


async def learn(
    client: ollama.AsyncClient, model: str, num_ctx: int, facts: dict[str, Any]
) -> None:
    """Adds a model's digest and context to ``facts``, as far as the server tells them."""

    async def context_length() -> int | None:
        """What the server gave it; if it has unloaded it, what it would give."""
        loaded = {_listed(m.model or ""): m.context_length for m in (await client.ps()).models}
        if allocated := loaded.get(_listed(model)):
            return allocated
        trained = await trained_context_of(client, model)
        return trained and min(trained, num_ctx)

    async def digest() -> str | None:
        return {_listed(m): d for m, d in (await digests(client)).items()}.get(_listed(model))

    for name, fact in (("context_length", context_length), ("digest", digest)):
        with suppress(Exception):  # A reply without its facts is still a reply.
            facts[name] = await asyncio.wait_for(fact(), METADATA_TIMEOUT_S)


async def trained_context_of(client: ollama.AsyncClient, model: str) -> int | None:
    """The context length that a model was trained for; None if the server does not tell."""
    info = (await client.show(model)).modelinfo or {}
    length = info.get(f"{info.get('general.architecture')}.context_length")
    return length if isinstance(length, int) else None


async def first_chat_model(client: ollama.AsyncClient) -> str | None:
    """The newest model that writes text, and runs on the server itself."""
    for name in await digests(client):
        if name.endswith("cloud"):
            continue  # It runs at ollama.com: nothing of a study goes there unasked.
        shown = await client.show(name)
        # Older servers do not tell; most embedding models are of this family.
        is_bert = "bert" in ((shown.details and shown.details.family) or "")
        if "completion" in (shown.capabilities or ["" if is_bert else "completion"]):
            return name
    return None


def _listed(model: str) -> str:
    """The name as the server lists it, of any name that it takes for the model."""
    name = model.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def _check_url(server: Server) -> None:
    url = server.url if "://" in server.url else f"http://{server.url}"
    if not is_http_url(url):
        raise ProviderError(
            f"`host` {server.host!r} is not the URL of a server, as in `http://127.0.0.1:11434`"
        )
    if url.rstrip("/").endswith("/v1"):
        raise ProviderError(
            f"`host` {server.host!r} ends in /v1, where the server speaks OpenAI's protocol: "
            "leave /v1 away, or take an OpenAI-compatible provider"
        )


def _client(server: Server) -> ollama.AsyncClient:
    with _IMPORT:
        hidden = {}
        if "ollama" not in sys.modules:  # Its import makes a client, with these variables.
            with suppress(ImportError):  # First what takes time: other threads miss them, too.
                import_module("httpx")
                import_module("pydantic")
            names = {name for name in os.environ if name.upper().endswith("_PROXY")}
            names |= os.environ.keys() & _VARIABLES
            hidden = {name: os.environ.pop(name) for name in names}
        try:
            import ollama
        finally:
            os.environ.update(hidden)
    return ollama.AsyncClient(host=server.url, **server.client_options())
