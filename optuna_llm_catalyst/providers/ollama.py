"""A local LLM behind an Ollama server, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import ipaddress
import json
import os
import re
from typing import Any
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest


if TYPE_CHECKING:
    import ollama

DEFAULT_MODEL = "gemma3:4b"
_DEFAULT_PORT = 11434


class OllamaProvider:
    """Completions of one model of an Ollama server.

    The client is made at the first request and dropped from copies and pickles.

    Args:
        model: Name of the model, as in ``ollama pull``.
        host: URL of the server. Default: ``OLLAMA_HOST``, else this machine's port 11434.
        timeout: Seconds to wait for a request. It includes the time to load the model.
        num_ctx: Context length in tokens; kept for the whole study, as a change reloads the
            model.
        num_predict: Most tokens of a reply; without a limit some models never stop.
        temperature: Sampling temperature.
        think: Whether models that can think before answering should.
        keep_alive: How long the server keeps the model loaded between two requests; longer than
            a stage, or every proposal waits for the model to load.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        host: str | None = None,
        timeout: float = 300.0,
        num_ctx: int = 8192,
        num_predict: int = 1024,
        temperature: float = 0.8,
        think: bool = False,
        keep_alive: str | float = "30m",
    ) -> None:
        if not model:
            raise ValueError("`model` must name a model, as in `gemma3:4b`, got an empty string.")
        if timeout <= 0:
            raise ValueError(f"`timeout` must be positive, got {timeout} seconds.")
        if not 0 < num_predict < num_ctx:
            raise ValueError(
                f"`num_predict` must be positive and below `num_ctx`, got {num_predict} and "
                f"{num_ctx}."
            )
        self.model = model
        self.host = host or os.environ.get("OLLAMA_HOST") or f"http://127.0.0.1:{_DEFAULT_PORT}"
        self._timeout = timeout
        self._options = {
            "num_ctx": num_ctx,
            "num_predict": num_predict,
            "temperature": temperature,
        }
        self._think = think
        self._keep_alive = keep_alive
        self._client: ollama.Client | None = None

    @property
    def name(self) -> str:
        return f"ollama:{self.model}"

    def complete(self, request: CompletionRequest) -> Completion:
        options = {**self._options, "seed": request.seed}
        with self._mapped_errors():
            response = self._get_client().chat(
                self.model,
                messages=[{"role": "user", "content": request.prompt}],
                stream=False,
                format=dict(request.schema),
                options=options,
                think=self._think,
                keep_alive=self._keep_alive,
            )
        text = response.message.content or ""
        # A server that gives up half way answers with HTTP 200 and without `done`.
        if not response.done or response.done_reason not in (None, "stop"):
            raise ProviderError(
                f"{self.name} stopped before its reply was whole "
                f"(done={response.done}, done_reason={response.done_reason!r}): {text[:80]!r}"
            )
        if not text.strip():
            raise ProviderError(f"{self.name} answered with an empty reply")
        details = {
            "digest": self._digest(),
            "options": options,
            "prompt_tokens": response.prompt_eval_count,
            "reply_tokens": response.eval_count,
            "load_seconds": (response.load_duration or 0) / 1e9,
        }
        return Completion(text, response.model or self.model, details)

    def models(self) -> dict[str, str]:
        """The server's models: name to digest.

        Raises:
            ProviderError: If no server answers.
        """
        with self._mapped_errors():
            listed = self._get_client().list().models
        return {model.model: model.digest or "" for model in listed if model.model}

    def check(self) -> None:
        """Checks that the server answers and has the model.

        Raises:
            ProviderError: If not; the message says what to do.
        """
        if _tagged(self.model) not in self.models():
            raise ProviderError(self._missing_model())

    def __getstate__(self) -> dict[str, Any]:
        # A client holds sockets and locks: copies make their own.
        return {**self.__dict__, "_client": None}

    def _digest(self) -> str | None:
        try:
            return self.models().get(_tagged(self.model))
        except ProviderError:
            return None  # A reply without a digest is still a reply.

    def _get_client(self) -> ollama.Client:
        if self._client is None:
            try:
                import httpx
                import ollama
            except ImportError as error:
                raise ProviderError(
                    "the Ollama client is not installed: pip install 'optuna-llm-catalyst[ollama]'"
                ) from error
            try:
                # A proxy from the environment would take requests to this machine elsewhere.
                self._client = ollama.Client(
                    host=self.host, timeout=self._timeout, trust_env=not _is_loopback(self.host)
                )
            except (ValueError, httpx.InvalidURL) as error:
                raise ProviderError(
                    f"`host` {self.host!r} is not the URL of a server: {error}"
                ) from error
        return self._client

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        """Maps what the client is known to raise to one error.

        Beside its own ``ResponseError`` these are httpx's errors, OSErrors for a refused
        connection, and, for bodies that are not what they should be, errors of JSON, of
        pydantic, AttributeErrors, TypeErrors and RecursionErrors.
        """
        self._get_client()
        import httpx
        import ollama
        import pydantic

        try:
            yield
        except ollama.ResponseError as error:
            # Another server on that port also says "not found", of its own pages.
            if error.status_code == 404 and re.search("model .* not found", str(error.error)):
                raise ProviderError(self._missing_model()) from error
            raise ProviderError(
                f"Ollama at {self.host} answered with HTTP {error.status_code}: "
                f"{str(error.error)[:200]}"
            ) from error
        except httpx.TimeoutException as error:
            raise ProviderError(
                f"Ollama at {self.host} did not answer within {self._timeout:g} seconds"
            ) from error
        except ConnectionError as error:
            raise ProviderError(f"no Ollama server answers at {self.host}") from error
        except (
            OSError,
            httpx.HTTPError,
            httpx.InvalidURL,
            json.JSONDecodeError,
            UnicodeDecodeError,
            pydantic.ValidationError,
            ollama.RequestError,
            AttributeError,
            TypeError,
            RecursionError,
        ) as error:
            raise ProviderError(
                f"Ollama at {self.host} gave no usable answer: {type(error).__name__}: "
                f"{str(error)[:200]}"
            ) from error

    def _missing_model(self) -> str:
        return (
            f"Ollama at {self.host} has no model {self.model!r}: get it with "
            f"`ollama pull {self.model}`"
        )


def _tagged(model: str) -> str:
    """The name as the server lists it: a model without a tag is its ``latest``."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


def _is_loopback(host: str) -> bool:
    name = urlsplit(host if "//" in host else f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback or name == "0.0.0.0"
    except ValueError:
        return name == "localhost"
