"""The way to a server with OpenAI's routes: the official client with its traps closed.

It would send the environment's keys and headers to whatever server it is pointed at, follow
redirects, retry on its own, read bodies without end, and make objects of any JSON without a look
at its types. Here it makes the requests, and the answers are read by hand.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
import json
import re
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar
from urllib.parse import unquote
from urllib.parse import urlsplit

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.deadline import run_within
from optuna_llm_catalyst.providers.servers import CONNECT_TIMEOUT_S
from optuna_llm_catalyst.providers.servers import is_loopback
from optuna_llm_catalyst.providers.servers import MAX_BODY
from optuna_llm_catalyst.providers.servers import TRANSIENT_STATUS


if TYPE_CHECKING:
    import openai

T = TypeVar("T")
#: Makes a request with the client's ``with_streaming_response``.
Send = Callable[["openai.AsyncOpenAI"], AbstractAsyncContextManager[Any]]

#: The client insists on a key; a server that was started without one reads none.
_NO_KEY = "none"
#: The headers that a server needs, and the one by which the client knows that it shall not read
#: the body. It adds facts about this machine to them, and whatever the environment's
#: OPENAI_CUSTOM_HEADERS says.
_HEADERS = {
    *("accept", "connection", "content-length", "content-type", "host", "user-agent"),
    "x-stainless-raw-response",
}
#: What a server that knows no JSON schemas calls the part of the request that it refuses.
_SCHEMA_WORDS = re.compile("response_format|json_schema|grammar")


@dataclass(frozen=True)
class OpenAIConnection:
    """How to reach a model. Holds no socket: each request has a client of its own.

    Attributes:
        url: The server's URL up to the version; it may carry a user and a password.
        api_key: The key for it.
        model: The model that is asked for, to be named in errors.
    """

    url: str = field(repr=False)
    api_key: str | None = field(repr=False)
    model: str

    def __post_init__(self) -> None:
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError(
                "`api_key` must be printable ASCII without spaces, as a header takes no other; "
                f"got {len(self.api_key)} characters, others among them."
            )
        if not _is_server(self.url):
            # What is no URL may hold a password anywhere before an @.
            shown = re.sub(r"^(\w+://)?.*@", r"\1", self.url, flags=re.DOTALL)
            raise ValueError(
                "`base_url` must be the URL of a server up to the version, as in "
                f"`http://127.0.0.1:8000/v1`, got {shown!r}."
            )

    @property
    def host(self) -> str:
        """The URL, without the credentials that it may carry."""
        return re.sub(r"(?<=//)[^/]*@", "", self.url).rstrip("/")

    def run(self, send: Send, read: Callable[[Any], T], timeout: float) -> T:
        """Makes one request.

        Args:
            send: Makes it with a client.
            read: Makes the result of the decoded JSON of the answer.
            timeout: Seconds it may take.

        Raises:
            ProviderError: For whatever goes wrong; ``transient`` if it may go right again.
        """
        _check_installed()
        with self._mapped_errors(timeout):
            body = run_within(timeout, lambda: self._exchange(send))
        try:
            return read(json.loads(body))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            start = " ".join(body[:800].decode(errors="replace").split())[:200]
            raise ProviderError(
                f"the server at {self.host} gave no usable answer: {type(error).__name__}: "
                f"{first_line(error)}, in {start!r}"
            ) from error

    async def _exchange(self, send: Send) -> bytes:
        bodies: list[bytes] = []

        async def read(response: Any) -> None:
            # The client reads errors whole, for as long as bytes come: this comes before.
            bodies.append(await _bounded(response.aiter_bytes()))
            if not response.is_success:
                raise self._refused(response.status_code, bodies[-1])

        async with self._client(read) as client, send(client):
            return bodies[-1]

    def _client(self, read: Callable[[Any], Any]) -> openai.AsyncOpenAI:
        import openai

        http_client = openai.DefaultAsyncHttpxClient(
            # Of each read; the deadline is for all of them.
            timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT_S),
            # A proxy from the environment would take requests to this machine elsewhere.
            trust_env=not is_loopback(self.url),
            follow_redirects=False,
            auth=self._sign,
            event_hooks={"response": [read]},
        )
        return openai.AsyncOpenAI(
            api_key=self.api_key or _NO_KEY,
            base_url=self.host,
            max_retries=0,
            http_client=http_client,
        )

    def _sign(self, request: Any) -> Any:
        """Sends the credentials that were given for this server, and nothing else of that kind."""
        for header in set(request.headers) - _HEADERS:
            del request.headers[header]
        # The limit on a body is for what it unpacks to.
        request.headers["Accept-Encoding"] = "identity"
        request.headers["Authorization"] = self._credentials()
        return request

    def _credentials(self) -> str:
        url = urlsplit(self.url)
        if self.api_key is not None or url.username is None:
            return f"Bearer {self.api_key or _NO_KEY}"
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"

    @contextmanager
    def _mapped_errors(self, timeout: float) -> Iterator[None]:
        import openai

        where = f"the server at {self.host}"
        try:
            yield
        except ProviderError:
            raise
        except openai.APITimeoutError as error:
            message = f"{where} accepted no connection within {CONNECT_TIMEOUT_S:g} seconds"
            raise ProviderError(message, transient=True) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ProviderError):  # openai 2 wraps what is raised on reading.
                raise cause from None
            message = f"{where} gave no answer: {type(cause).__name__}: {first_line(cause)}"
            raise ProviderError(message, transient=True) from error
        except TimeoutError as error:
            raise ProviderError(f"{where} did not answer within {timeout:.3g} seconds") from error
        # URLs that are none after all, and whatever else the client stumbles over.
        except Exception as error:
            raise ProviderError(
                f"{where} gave no usable answer: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _refused(self, status: int, body: bytes) -> ProviderError:
        message = _message(body)
        if self.api_key:
            message = message.replace(self.api_key, "***")
        return ProviderError(
            f"the server at {self.host} answered with HTTP {status}: {message[:200]}"
            f"{self._advice(status, message)}",
            transient=status in TRANSIENT_STATUS,
        )

    def _advice(self, status: int, message: str) -> str:
        if status == 404:
            return (
                f" (has it no model {self.model!r}, or does `base_url` lack its `/v1`? "
                f"`curl {self.host}/models` lists the models)"
            )
        if status in (401, 403):
            return " (is `api_key` the key that the server was started with?)"
        if status in (400, 422) and _SCHEMA_WORDS.search(message):
            return " (it takes no JSON schema as `response_format`: it needs a newer version)"
        if status == 400 and "context" in message:
            return " (`num_ctx` must be the context length that the server was started with)"
        return " (`base_url` must be where it redirects to)" if 300 <= status < 400 else ""


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading a port that is none raises.
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(complete) and re.fullmatch("[!-~]+", url) is not None


def _check_installed() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ProviderError(
            "the OpenAI client is not installed: pip install 'optuna-llm-catalyst[openai]'"
        ) from error


async def _bounded(chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > MAX_BODY:
            raise ProviderError(f"the server's answer is over {MAX_BODY} bytes long")
    return bytes(body)


def _message(body: bytes) -> str:
    """What an error's body says: servers put it under any of these keys, or send a page."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return " ".join((said if isinstance(said, str) else text).split())
