"""An LLM behind a server that speaks OpenAI's chat completions: vLLM, llama.cpp's and others."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import check_limits
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.openai_connection import OpenAIConnection


if TYPE_CHECKING:
    import openai

T = TypeVar("T")
#: For questions that need no model.
_METADATA_TIMEOUT_S = 10.0
#: Fields beside the content in which servers put what a model thought.
_THOUGHTS = ("reasoning_content", "reasoning")


class OpenAICompatibleProvider:
    """Completions of one model of a server with the routes of OpenAI's API.

    None of the environment's ``OPENAI_…`` variables is used or sent: whoever set them did not
    mean this server.

    Args:
        model: Name of the model, as the server lists it at ``{base_url}/models``.
        base_url: URL of the server up to the version, as in ``http://127.0.0.1:8000/v1``.
        api_key: Goes to that server only. It is part of the provider's pickles.
        num_ctx: The context length in tokens that the server was started with; it cannot be told
            another.
        num_predict: Most tokens of a reply, sent as ``max_tokens``.
        temperature: Sampling temperature.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str | None = None,
        num_ctx: int = 8192,
        num_predict: int = 1024,
        temperature: float = 0.8,
    ) -> None:
        if not model:
            raise ValueError(
                "`model` must name a model as the server lists it, got an empty string."
            )
        check_limits(num_ctx, num_predict, temperature)
        self.model = model
        self._connection = OpenAIConnection(base_url, api_key, model)
        self._num_ctx = num_ctx
        self._num_predict = num_predict
        self._temperature = temperature

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    @property
    def base_url(self) -> str:
        """The server's URL, without credentials."""
        return self._connection.host

    @property
    def max_prompt_tokens(self) -> int:
        return self._num_ctx - self._num_predict

    def complete(self, request: CompletionRequest) -> Completion:
        return self._connection.run(
            lambda client: self._chat(client, request),
            lambda answer: self._completion(request, answer),
            request.timeout,
        )

    def models(self) -> list[str]:
        """Names of the server's models.

        Raises:
            ProviderError: If no server answers, or with something else.
        """
        return self._connection.run(
            lambda client: client.models.with_streaming_response.list(),
            lambda answer: [_string(model["id"], "id") for model in answer["data"]],
            _METADATA_TIMEOUT_S,
        )

    def check(self) -> None:
        """Checks that the server answers and has the model.

        Raises:
            ProviderError: If not; the message says what to do.
        """
        names = self.models()
        if self.model not in names:
            served = ", ".join(map(repr, names[:10])) or "none at all"
            raise ProviderError(
                f"the server at {self.base_url} has no model {self.model!r}; its models: {served}"
            )

    def _chat(
        self, client: openai.AsyncOpenAI, request: CompletionRequest
    ) -> AbstractAsyncContextManager[Any]:
        return client.chat.completions.with_streaming_response.create(
            model=self.model,
            messages=[{"role": "user", "content": request.prompt}],
            # Not `strict`, whose rules forbid schemas that are no trouble to local servers.
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "prompts", "schema": dict(request.schema)},
            },
            # llama.cpp's server does not know `max_completion_tokens`.
            max_tokens=self._num_predict,
            temperature=self._temperature,
            seed=request.seed,
        )

    def _completion(self, request: CompletionRequest, answer: Any) -> Completion:
        choice = _first_choice(answer)
        text, is_thought = _text(choice["message"])
        reason = _string(choice.get("finish_reason") or "", "finish_reason")
        usage = answer.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        details: dict[str, Any] = {
            "options": self._options(request.seed),
            "finish_reason": reason or None,
            "prompt_tokens": _known(counts.get("prompt_tokens"), int),
            "reply_tokens": _known(counts.get("completion_tokens"), int),
        }
        if fingerprint := _known(answer.get("system_fingerprint"), str):
            details["system_fingerprint"] = fingerprint
        if is_thought:
            details["reply_from"] = "thinking"
        model = _known(answer.get("model"), str) or self.model
        return Completion(text, model, self._problem(reason, text), details)

    def _options(self, seed: int) -> dict[str, Any]:
        return {
            "num_predict": self._num_predict,
            "temperature": self._temperature,
            "seed": seed,
        }

    def _problem(self, reason: str, text: str) -> str:
        """What the server itself says against its reply."""
        if reason != "length":
            return "" if reason in ("", "stop") else f"it ended with {reason!r}"
        limit = f"max_tokens={self._num_predict}"
        if not text.strip():
            # Another seed fares no better: the model thinks longer than it may.
            raise ProviderError(
                f"{self.name} used up {limit} without an answer: raise `num_predict`"
            )
        return f"it was cut at {limit}"


def _first_choice(answer: Any) -> Any:
    choices = answer["choices"]
    if not isinstance(choices, list) or not choices:
        raise ValueError("`choices` is no list of one")
    return choices[0]


def _text(message: Any) -> tuple[str, bool]:
    """The text of a reply, and whether it was found among the thoughts of the model."""
    content = _string(message.get("content") or "", "content")
    thoughts = [_known(message.get(key), str) or "" for key in _THOUGHTS]
    thought = next(filter(str.strip, thoughts), "")
    return (content, False) if content.strip() or not thought else (thought, True)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is no string")
    return value


def _known(value: Any, kind: type[T]) -> T | None:
    """A fact that a reply is whole without."""
    return value if isinstance(value, kind) else None
