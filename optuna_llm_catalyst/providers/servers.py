"""What the providers of LLM servers share: addresses, keys, limits, formats and errors.

The official clients make the requests. By themselves they wait for ever, send requests to this
machine through the environment's proxies, follow redirects, send the environment's keys to any
host, and read bodies of any length.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from dataclasses import field
import ipaddress
import json
import re
import ssl
import time
from typing import Any
from typing import TypeVar
from urllib.parse import SplitResult
from urllib.parse import unquote
from urllib.parse import urlsplit
from urllib.request import getproxies

from optuna_llm_catalyst.background import run_within
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import CompletionRequest


C = TypeVar("C")
T = TypeVar("T")
#: The longest body that is read, in bytes.
MAX_BODY = 4 * 2**20
_CONNECT_TIMEOUT_S = 10.0
#: For requests that need no model.
METADATA_TIMEOUT_S = 10.0
#: HTTP statuses after which the same request may succeed a little later.
_TRANSIENT_STATUS = (408, 429, 502, 503, 504)
#: What Ollama says with status 500 when the process that runs the model died. The request is
#: repeated like after any other transient error.
_CRASH = re.compile("runner|unexpected EOF")
#: What servers call the part of a request that they refuse.
_FORMAT = re.compile(
    "response_format|json_object|schema|grammar|\\bpattern|[`'\"]format[`'\"]|Request\\.format"
    r"|\b(invalid|unsupported|for) format\b|\bformat is not supported",
    re.IGNORECASE,
)
#: The headers that servers need, and the one by which OpenAI's client knows that its caller reads
#: the body. That client also sends facts about this machine, and OPENAI_CUSTOM_HEADERS.
_HEADERS = {
    *("accept", "connection", "content-length", "content-type", "host", "user-agent"),
    "x-stainless-raw-response",
}


@dataclass(frozen=True)
class ReplyFormat:
    """What a request says of its reply; ``details`` is what the record then tells of it."""

    kind: str  # ``json_schema``, ``json_object`` (any JSON) or ``none``.
    schema: dict[str, Any] | None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """Where requests go. Holds no socket: each exchange has a client of its own."""

    kind: str  # As messages call it.
    url: str = field(repr=False)  # It may hold a user and a password.
    key: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The URL without credentials, for messages."""
        # Up to the last at sign: a password may hold one, or a slash.
        return re.sub(r"^(\w+://)?.*@", r"\1", self.url, flags=re.DOTALL).rstrip("/")

    @property
    def where(self) -> str:
        return f"the {self.kind} at {self.host}"

    def exchange(
        self,
        connect: Callable[[], AbstractAsyncContextManager[C]],
        work: Callable[[C], Coroutine[Any, Any, T]],
        timeout: float,
    ) -> T:
        """Works with a client within so many seconds; a ProviderError tells what went wrong."""
        try:
            connected = connect()
        except ModuleNotFoundError as error:
            raise ProviderError(
                f"the client {error.name!r} is not installed: "
                f"pip install 'optuna-llm-catalyst[{error.name}]'"
            ) from error
        except Exception as error:
            # The error may quote a piece of a proxy's password.
            secret = any("@" in proxy for proxy in getproxies().values())
            why = type(error).__name__ if secret else first_line(error)
            raise ProviderError(
                f"{self.where} cannot be reached: {why}; check the environment's SSL_CERT_FILE, "
                "SSL_CERT_DIR and proxies (ALL_PROXY, HTTP_PROXY, …)"
            ) from error

        async def run() -> T:
            async with connected as client:
                return await work(client)

        try:
            return run_within(timeout, run)
        except Exception as error:  # The clients let a dozen kinds of errors through.
            chain = list(_chain(error))
            told = next((e for e in chain if isinstance(e, ProviderError)), None)
            if told:  # OpenAI's client wraps what is raised while it reads.
                raise told from None
            raise self._provider_error(chain, timeout) from error

    @property
    def _url(self) -> SplitResult:
        return urlsplit(self.url if "//" in self.url else f"//{self.url}")

    @property
    def _basic(self) -> str:
        """The URL's user and password as a header has them; empty if there is no user."""
        user, password = self._url.username, self._url.password
        pair = "" if user is None else f"{unquote(user)}:{unquote(password or '')}"
        return base64.b64encode(pair.encode()).decode()

    def client_options(self) -> dict[str, Any]:
        """Arguments that close the traps of an ``httpx`` client; httpx2 takes the same."""
        return {
            # Of each read; the deadline is for all of them.
            "timeout": (_CONNECT_TIMEOUT_S, None, None, None),
            # A proxy would take requests to this machine elsewhere.
            "trust_env": not is_loopback(self.url),
            "follow_redirects": False,
            "auth": self._sign,
            "event_hooks": {"response": [self._read]},
        }

    def _sign(self, request: Any) -> Any:
        """Sends the credentials that are meant for this server, and no others."""
        for header in set(request.headers) - _HEADERS:
            del request.headers[header]
        # The limit on a body is for what it unpacks to.
        request.headers["Accept-Encoding"] = "identity"
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        elif self._basic:
            request.headers["Authorization"] = f"Basic {self._basic}"
        return request

    def masked(self, text: str) -> str:
        """What the server wrote, without the credentials that it was sent."""
        password = self._url.password or ""
        for secret in (self.key, self._basic, unquote(password), password):
            if secret:
                text = text.replace(secret, "***")
        return text

    async def _read(self, response: Any) -> None:
        """Reads a response's body up to the limit, before the client would read all of it."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ProviderError(f"{self.where} sent a compressed answer, which is not read")
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_BODY:
                raise ProviderError(f"{self.where}: its answer is over {MAX_BODY} bytes long")
        response._content = bytes(body)  # What the client then takes for read.
        if not response.is_success:
            said = self.masked(one_line(message_of(body.decode(errors="replace"))))[:300]
            status = response.status_code
            crashed = status == 500 and _CRASH.search(said)
            raise ProviderError(
                f"{self.where} answered with HTTP {status}: {said}",
                transient=status in _TRANSIENT_STATUS or bool(crashed),
                status=status,
                said=said,
            )

    def _provider_error(self, chain: list[BaseException], timeout: float) -> ProviderError:
        if isinstance(chain[0], TimeoutError):
            return ProviderError(f"{self.where} did not answer within {timeout:.3g} seconds")
        # By their names, as the clients use different versions of httpx.
        kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
        tls = next((e for e in chain if isinstance(e, ssl.SSLError)), None)
        if "ConnectTimeout" in kinds:
            late = f"accepted no connection within {_CONNECT_TIMEOUT_S:g} seconds"
            return ProviderError(f"{self.where} {late}", transient=True)
        if tls and "ConnectError" in kinds:
            return ProviderError(
                f"{self.where} cannot be reached: {first_line(tls)}; is `https` right, and does "
                "SSL_CERT_FILE name a certificate of your own?"
            )
        if "ConnectError" in kinds:
            return ProviderError(f"no {self.kind} answers at {self.host}", transient=True)
        cause = chain[0].__cause__ or chain[0]
        why = f"{type(cause).__name__}: {one_line(first_line(cause))[:200]}"
        if kinds & {"NetworkError", "ProtocolError", "OSError"}:
            return ProviderError(f"{self.where} broke the connection: {why}", transient=True)
        return ProviderError(f"{self.where} gave no usable answer: {why}")


def is_loopback(url: str) -> bool:
    """Whether a URL, or a host alone, is this machine."""
    name = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    try:
        address = ipaddress.ip_address(name)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return name in ("", "localhost")


def is_http_url(url: str) -> bool:
    """Whether a URL has a scheme and a port that can be used, and no blank."""
    try:
        parts = urlsplit(url)
        # Reading a port that is no number raises.
        usable = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return False
    return usable and url.isprintable() and " " not in url


def check_key(name: str, key: str | None) -> None:
    """Raises a ValueError that does not show the key if no header can hold it."""
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise ValueError(
            f"`{name}` must be printable ASCII without spaces, as a header takes no other; got "
            f"{len(key)} characters, others among them."
        )


def in_format(
    request: CompletionRequest, first: int, send: Callable[[ReplyFormat, float], T]
) -> tuple[T, Mapping[str, Any], int]:
    """Makes a request in the strictest format that the server takes, from the ``first`` on.

    ``send`` makes it in a format, within so many seconds. Returns what ``send`` did, the format's
    details, and its number, from which the next request goes on.
    """
    deadline = time.monotonic() + request.timeout
    schema, plain = dict(request.schema), _without_patterns(request.schema)
    formats = [
        ReplyFormat("json_schema", schema),
        ReplyFormat("json_schema", plain, {"format": "json_schema", "pattern": False}),
        ReplyFormat("json_object", plain, {"format": "json_object"}),
        ReplyFormat("none", None, {"format": "none"}),
    ]
    numbers = [i for i in range(first, len(formats)) if i != 1 or plain != schema or first == 1]
    for i in numbers:
        try:
            sent = send(formats[i], max(deadline - time.monotonic(), 0.0))
            return sent, formats[i].details, i
        except ProviderError as error:
            is_format = error.status in (400, 422, 500) and _FORMAT.search(error.said)
            if not is_format or i == numbers[-1] or time.monotonic() >= deadline:
                raise
    raise AssertionError("The last format is sent or raises.")


def _without_patterns(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    return {key: _without_patterns(value) for key, value in schema.items() if key != "pattern"}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def message_of(text: str) -> str:
    """The message of an error's body: some put JSON into its text, some send a page."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return message_of(value) if isinstance(value, str) else text
