"""An LLM behind a server that speaks OpenAI's chat completions: vLLM, llama.cpp's and others.

OpenAI's client would make objects of any JSON without a look at its types: here the answers are
read strictly, from the bytes that came.
"""

from __future__ import annotations

from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import json
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar
from urllib.parse import urlsplit

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import LimitedProvider
from optuna_llm_catalyst.providers.servers import check_key
from optuna_llm_catalyst.providers.servers import in_format
from optuna_llm_catalyst.providers.servers import is_http_url
from optuna_llm_catalyst.providers.servers import METADATA_TIMEOUT_S
from optuna_llm_catalyst.providers.servers import ReplyFormat
from optuna_llm_catalyst.providers.servers import Server
from optuna_llm_catalyst.schema import decode


if TYPE_CHECKING:
    import openai

T = TypeVar("T")


@dataclass(frozen=True)
class _Message:
    content: str | None = None
    # Where servers put what a model thought. Values that are not text are ignored.
    reasoning_content: Any = None
    reasoning: Any = None


@dataclass(frozen=True)
class _Choice:
    message: _Message
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Answer:
    """An answer to a chat request. Facts that a reply is whole without may be anything."""

    choices: list[_Choice]
    usage: Any = None
    model: Any = None
    system_fingerprint: Any = None


@dataclass(frozen=True)
class _Model:
    id: str


@dataclass(frozen=True)
class _Models:
    data: list[_Model]


class OpenAICompatibleProvider(LimitedProvider):
    """Completions of one model of a server with the routes of OpenAI's API.

    The environment's ``OPENAI_…`` variables are meant for others: none is used or sent.

    Args:
        model: Name of the model, as the server lists it at ``{base_url}/models``; empty for the
            only one of the server, which :meth:`check` or the first request finds.
        base_url: URL of the server up to the version, as in ``http://127.0.0.1:8000/v1``.
        api_key: Goes to that server only. It is part of the provider's pickles.
        num_ctx: The context length in tokens that the server was started with.
        num_predict: Most tokens of a reply, sent as ``max_tokens``.
        temperature: Sampling temperature.

    Attributes:
        note: Which model :meth:`check` took instead, in a sentence; empty if it took none.
    """

    _kind = "openai"
    _cut_at = "max_tokens={}"

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str,
        api_key: str | None = None,
        num_ctx: int = 8192,
        num_predict: int = 1024,
        temperature: float = 0.8,
    ) -> None:
        super().__init__(model, num_ctx, num_predict, temperature)
        check_key("api_key", api_key)
        self._server = Server("server", base_url, api_key)
        if not is_http_url(base_url) or not urlsplit(base_url).hostname:
            raise ValueError(
                "`base_url` must be the URL of a server up to the version, as in "
                f"`http://127.0.0.1:8000/v1`, got {self._server.host!r}."
            )
        self.note = ""
        self._format = 0  # Learnt from the server's answers.

    @property
    def base_url(self) -> str:
        """The server's URL without credentials."""
        return self._server.host

    def complete(self, request: CompletionRequest) -> Completion:
        if not self.model:
            self.check()
        limit = self._limit(request)
        options = {"num_predict": limit, "temperature": self._temperature, "seed": request.seed}
        answer, told, self._format = in_format(
            request,
            self._format,
            lambda form, seconds: self._exchange(
                lambda client: client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": request.prompt}],
                    # llama.cpp's server does not know `max_completion_tokens`.
                    max_tokens=limit,
                    temperature=self._temperature,
                    seed=request.seed,
                    **_response_format(form),
                ),
                _Answer,
                seconds,
            ),
        )
        if not answer.choices:
            raise ProviderError(f"{self._server.where} gave no usable answer: no choices")
        reason, message = answer.choices[0].finish_reason, answer.choices[0].message
        usage = _known(answer.usage, dict) or {}
        details: dict[str, Any] = {
            "options": options,
            "finish_reason": reason or None,
            "prompt_tokens": _known(usage.get("prompt_tokens"), int),
            "reply_tokens": _known(usage.get("completion_tokens"), int),
            **told,
        }
        if fingerprint := _known(answer.system_fingerprint, str):
            details["system_fingerprint"] = fingerprint
        thoughts = [_known(t, str) or "" for t in (message.reasoning_content, message.reasoning)]
        thought = next(filter(str.strip, thoughts), "")
        completion = self._completion(message.content or "", thought, reason, limit, details)
        return replace(completion, model=_known(answer.model, str) or self.model)

    def models(self) -> list[str]:
        """Names of the server's models; raises a ``ProviderError`` if none can be had."""
        listed = self._exchange(
            lambda client: client.models.with_raw_response.list(), _Models, METADATA_TIMEOUT_S
        )
        return [model.id for model in listed.data]

    def check(self) -> None:
        """Checks that the server has the model; takes its only one for another name.

        Raises:
            ProviderError: If it does not answer, or has neither.
        """
        names = self.models()
        lacks = f"has no model {self.model!r}"
        if len(names) == 1 and self.model not in names:
            wanted = lacks if self.model else "has one model"
            self.note = f"{self._server.where} {wanted}: {names[0]!r} is used, its only one"
            self.model = names[0]
        if self.model not in names:
            fault = lacks if self.model else "needs the name of a model"
            served = ", ".join(map(repr, names[:10])) or "none at all"
            raise ProviderError(f"{self._server.where} {fault}; its models: {served}")

    def _exchange(
        self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], kind: type[T], timeout: float
    ) -> T:
        async def work(client: openai.AsyncOpenAI) -> bytes:
            return bytes((await send(client)).content)

        try:
            body = self._server.exchange(self._client, work, timeout)
        except ProviderError as error:
            if advice := self._advice(error.status or 0, str(error)):
                raise ProviderError(
                    f"{error} ({advice})", status=error.status, said=error.said
                ) from error
            raise
        try:
            return decode(kind, json.loads(body))
        except (RecursionError, ValueError) as error:
            text = self._server.masked(body[:800].decode(errors="replace"))
            start = " ".join(text.split())[:200]
            fault = f"gave no usable answer: {first_line(error)}, in {start!r}"
            raise ProviderError(f"{self._server.where} {fault}") from error

    def _client(self) -> openai.AsyncOpenAI:
        import openai

        url = urlsplit(self._server.url)
        return openai.AsyncOpenAI(
            api_key=self._server.key or "none",  # It insists on one, which is not sent.
            base_url=url._replace(netloc=url.netloc.rpartition("@")[2]).geturl(),
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(**self._server.client_options()),
        )

    def _advice(self, status: int, message: str) -> str:
        if status == 404:
            return (
                f"has it no model {self.model!r}, or does `base_url` lack its `/v1`? "
                f"`curl {self.base_url}/models` lists the models"
            )
        if status in (401, 403):
            return "is `api_key` the key that the server was started with?"
        if status == 400 and "context" in message:
            return "`num_ctx` must be the context length that the server was started with"
        return "`base_url` must be where it redirects to" if 300 <= status < 400 else ""


def _response_format(form: ReplyFormat) -> dict[str, Any]:
    if form.schema is None:
        return {}
    schema = dict(form.schema)
    if form.kind == "json_object":
        return {"response_format": {"type": "json_object", "schema": schema}}
    # Strict mode rejects schemas that local servers accept.
    named = {"name": "prompts", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _known(value: Any, kind: type[T]) -> T | None:
    """A fact that a reply is whole without."""
    return value if isinstance(value, kind) else None
