"""The way to an Ollama server: the official client with its traps closed.

It waits for ever, takes HTTP proxies for requests to this machine, follows redirects, sends the
API key of the environment to any host, and lets half a dozen kinds of exception through.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import json
import re
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.deadline import run_within
from optuna_llm_catalyst.providers.servers import CONNECT_TIMEOUT_S
from optuna_llm_catalyst.providers.servers import is_loopback
from optuna_llm_catalyst.providers.servers import MAX_BODY
from optuna_llm_catalyst.providers.servers import TRANSIENT_STATUS


if TYPE_CHECKING:
    import httpx
    import ollama

T = TypeVar("T")
Ask = Callable[["ollama.AsyncClient"], Coroutine[Any, Any, T]]


@dataclass(frozen=True)
class OllamaConnection:
    """How to reach a server. Holds no socket: each request has a client of its own.

    Attributes:
        url: The server.
        sends_key: Whether ``OLLAMA_API_KEY`` may go there.
    """

    url: str
    sends_key: bool

    @property
    def host(self) -> str:
        """The server, without the credentials that its URL may carry."""
        # Up to the last at sign: a password may hold one, or a slash.
        return re.sub(r"^(\w+://)?.*@", r"\1", self.url, flags=re.DOTALL)

    def run(self, ask: Ask[T], timeout: float) -> T:
        """Asks, within so many seconds.

        Raises:
            ProviderError: For whatever goes wrong; ``transient`` if it may go right again.
        """
        _check_installed()

        async def work() -> T:
            async with self._checked_client() as client:
                return await ask(client)

        with self._mapped_errors(timeout):
            return run_within(timeout, work)

    def _checked_client(self) -> ollama.AsyncClient:
        import httpx

        try:
            return self._client()
        except UnicodeEncodeError:
            raise self._bad_key() from None
        except (ValueError, httpx.InvalidURL) as error:
            # The error may quote a piece of a password.
            why = "" if "@" in self.url else f": {error}"
            raise ProviderError(f"`host` {self.host!r} is not the URL of a server{why}") from None

    def _bad_key(self) -> ProviderError:
        # The client's own error quotes the key.
        return ProviderError(
            f"Ollama at {self.host} cannot be asked: `OLLAMA_API_KEY` is no valid header; "
            "does it hold a blank or a line feed at its end?"
        )

    def _client(self) -> ollama.AsyncClient:
        import httpx
        import ollama

        # The client takes the key itself: only an `auth` of ours can take it away again.
        keyless = {} if self.sends_key else {"auth": _without_key}
        return ollama.AsyncClient(
            host=self.url,
            # Of each read; the deadline is for all of them.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=not is_loopback(self.url),
            follow_redirects=False,
            event_hooks={"response": [_cap_body]},
            headers={"Accept-Encoding": "identity"},
            **keyless,
        )

    @contextmanager
    def _mapped_errors(self, timeout: float) -> Iterator[None]:
        """Maps what the client is known to raise to one error."""
        import httpx
        import ollama
        import pydantic

        where = f"Ollama at {self.host}"
        try:
            yield
        except ollama.ResponseError as error:
            raise self._refused(error.status_code, str(error.error)) from error
        except httpx.HTTPStatusError as error:
            raise self._refused(error.response.status_code, error.response.text) from error
        except httpx.ConnectTimeout as error:
            message = f"{where} accepted no connection within {CONNECT_TIMEOUT_S:g} seconds"
            raise ProviderError(message, transient=True) from error
        except TimeoutError as error:
            raise ProviderError(f"{where} did not answer within {timeout:.3g} seconds") from error
        except ConnectionError as error:
            message = f"no Ollama server answers at {self.host}"
            raise ProviderError(message, transient=True) from error
        except httpx.LocalProtocolError:
            raise self._bad_key() from None
        except (httpx.NetworkError, httpx.ProtocolError, OSError) as error:
            message = f"{where} broke the connection: {type(error).__name__}: {first_line(error)}"
            raise ProviderError(message, transient=True) from error
        except (
            httpx.HTTPError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            pydantic.ValidationError,
            ollama.RequestError,
            AttributeError,
            KeyError,
            TypeError,
            RecursionError,
            ValueError,  # An integer of over 4300 digits.
        ) as error:
            why = f"{type(error).__name__}: {one_line(str(error))[:200]}"
            raise ProviderError(f"{where} gave no usable answer: {why}") from error
        except httpx.InvalidURL as error:
            raise ProviderError(f"`host` {self.host!r} is not the URL of a server") from error

    def _refused(self, status: int, message: str) -> ProviderError:
        # Another server on that port also says "not found", of its own pages.
        missing = re.search(r"model ['\"]?([^'\"]{1,200})['\"]? not found", message)
        if status == 404 and missing:
            return ProviderError(self.missing_model(missing[1]))
        crashed = status == 500 and "runner" in message
        return ProviderError(
            f"Ollama at {self.host} answered with HTTP {status}: {one_line(message)[:200]}",
            transient=status in TRANSIENT_STATUS or crashed,
        )

    def missing_model(self, model: str) -> str:
        """What to do about a model that the server has not."""
        return f"Ollama at {self.host} has no model {model!r}: get it with `ollama pull {model}`"


def _check_installed() -> None:
    try:
        import ollama  # noqa: F401
    except ModuleNotFoundError as error:
        raise ProviderError(
            "the Ollama client is not installed: pip install 'optuna-llm-catalyst[ollama]'"
        ) from error
    except Exception as error:
        # Its import makes a client, which fails for some proxies of the environment.
        raise ProviderError(
            f"the Ollama client cannot be imported: {first_line(error)} Is a proxy set in the "
            "environment (ALL_PROXY) that it cannot use?"
        ) from error


def _without_key(request: httpx.Request) -> httpx.Request:
    request.headers.pop("Authorization", None)
    return request


async def _cap_body(response: httpx.Response) -> None:
    """Ends a body that would fill the memory before the deadline comes."""
    import httpx

    if response.headers.get("Content-Encoding", "identity") != "identity":
        # A few packed bytes may be a gigabyte; it was not asked for.
        raise ProviderError("the server's answer is packed")
    stream: Any = response.stream

    class Capped(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            n_bytes = 0
            async for chunk in stream:
                n_bytes += len(chunk)
                if n_bytes > MAX_BODY:
                    raise ProviderError(f"the server's answer is over {MAX_BODY} bytes long")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Capped()
