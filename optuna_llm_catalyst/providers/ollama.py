"""A local LLM behind an Ollama server.

Met here, as servers really behave: a prompt that is too long is cut in silence, a reply that
broke off comes as HTTP 200, and a model that thinks may leave its answer among its thoughts.
"""

from __future__ import annotations

from contextlib import suppress
import os
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import check_limits
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.providers.ollama_connection import OllamaConnection


if TYPE_CHECKING:
    import ollama

DEFAULT_MODEL = "gemma3:4b"
DEFAULT_NUM_CTX = 8192
_DEFAULT_URL = "http://127.0.0.1:11434"
#: For questions that need no model.
_METADATA_TIMEOUT_S = 10.0
#: How far from half the context the server's count of a prompt that it cut may lie.
_CUT_SLACK = 4


class OllamaProvider:
    """Completions of one model of an Ollama server.

    Args:
        model: Name of the model, as in ``ollama pull``.
        host: URL of the server. Default: ``OLLAMA_HOST``, else this machine's port 11434.
            ``OLLAMA_API_KEY`` is sent to a host that is named by one of the two, never to the
            default one.
        num_ctx: Context length in tokens; kept for the whole study, as a change reloads the
            model.
        num_predict: Most tokens of a reply; without a limit some models never stop.
        temperature: Sampling temperature.
        think: Whether models that can think before answering should; or how much, as
            ``"low"``, for models that know levels.
        keep_alive: How long the server keeps the model loaded between two requests; longer than
            a stage, or every proposal waits for the model to load.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        host: str | None = None,
        num_ctx: int = DEFAULT_NUM_CTX,
        num_predict: int = 1024,
        temperature: float = 0.8,
        think: Any = False,
        keep_alive: str | float = "30m",
    ) -> None:
        if not model:
            raise ValueError("`model` must name a model, as in `gemma3:4b`, got an empty string.")
        check_limits(num_ctx, num_predict, temperature)
        named = host or os.environ.get("OLLAMA_HOST")
        self.model = model
        self._connection = OllamaConnection(named or _DEFAULT_URL, sends_key=bool(named))
        self._num_ctx = num_ctx
        self._num_predict = num_predict
        self._temperature = temperature
        self._think = think
        self._keep_alive = keep_alive

    @property
    def name(self) -> str:
        return f"ollama:{self.model}"

    @property
    def host(self) -> str:
        """The server's URL, without credentials."""
        return self._connection.host

    @property
    def max_prompt_tokens(self) -> int:
        return self._num_ctx - self._num_predict

    def complete(self, request: CompletionRequest) -> Completion:
        started = time.monotonic()
        options = {
            "num_ctx": self._num_ctx,
            "num_predict": self._num_predict,
            "temperature": self._temperature,
            "seed": request.seed,
        }
        response = self._chat(request, options)
        facts = self._facts(request.timeout - (time.monotonic() - started))
        self._check_prompt(request.prompt, response.prompt_eval_count, facts["context_length"])
        content, thoughts = response.message.content or "", response.message.thinking or ""
        text = content if content.strip() else thoughts
        details = {
            **facts,
            "options": options,
            "done_reason": response.done_reason,
            "prompt_tokens": response.prompt_eval_count,
            "reply_tokens": response.eval_count,
            "load_seconds": (response.load_duration or 0) / 1e9,
        }
        if text.strip() and text is thoughts:
            details["reply_from"] = "thinking"
        return Completion(
            text, response.model or self.model, self._problem(response, text), details
        )

    def models(self) -> dict[str, str]:
        """The server's models: name to digest.

        Raises:
            ProviderError: If no server answers.
        """
        return self._connection.run(_digests, _METADATA_TIMEOUT_S)

    def check(self) -> None:
        """Checks that the server answers and has the model.

        Raises:
            ProviderError: If not; the message says what to do.
        """
        if _tagged(self.model) not in self.models():
            raise ProviderError(self._connection.missing_model(self.model))

    def model_context_length(self) -> int | None:
        """The context length that the model was trained for; None if the server does not tell.

        Raises:
            ProviderError: If the server does not answer or has no such model.
        """

        async def ask(client: ollama.AsyncClient) -> int | None:
            info = (await client.show(self.model)).modelinfo or {}
            length = info.get(f"{info.get('general.architecture')}.context_length")
            return length if isinstance(length, int) else None

        return self._connection.run(ask, _METADATA_TIMEOUT_S)

    def server_version(self) -> str:
        """The server's version.

        Raises:
            ProviderError: If no Ollama server answers.
        """

        async def ask(client: ollama.AsyncClient) -> str:
            # The client has no method for it.
            response = await client._client.get("/api/version")
            return str(response.raise_for_status().json()["version"])

        return self._connection.run(ask, _METADATA_TIMEOUT_S)

    def _chat(self, request: CompletionRequest, options: dict[str, Any]) -> ollama.ChatResponse:
        async def ask(client: ollama.AsyncClient) -> ollama.ChatResponse:
            return await client.chat(
                self.model,
                messages=[{"role": "user", "content": request.prompt}],
                stream=False,
                format=dict(request.schema),
                options=options,
                think=self._think,
                keep_alive=self._keep_alive,
            )

        return self._connection.run(ask, request.timeout)

    def _facts(self, seconds: float) -> dict[str, Any]:
        """The model's digest, and the context really allocated; None where it is not told.

        A reply without them is still a reply.
        """
        facts: dict[str, Any] = {"digest": None, "context_length": None}

        async def ask_context(client: ollama.AsyncClient) -> None:
            loaded = {m.model: m.context_length for m in (await client.ps()).models}
            facts["context_length"] = loaded.get(_tagged(self.model))

        async def ask_digest(client: ollama.AsyncClient) -> None:
            facts["digest"] = (await _digests(client)).get(_tagged(self.model))

        deadline = time.monotonic() + min(seconds, _METADATA_TIMEOUT_S)
        for question in (ask_context, ask_digest):
            with suppress(ProviderError):
                self._connection.run(question, deadline - time.monotonic())
        return facts

    def _problem(self, response: ollama.ChatResponse, text: str) -> str:
        """What the server itself says against its reply.

        A server that gives up half way answers with HTTP 200 and without ``done``.
        """
        reason = response.done_reason
        if reason in ("load", "unload"):
            raise ProviderError(
                f"Ollama at {self.host} did not answer: it only {reason}ed {self.model!r}",
                transient=True,
            )
        if reason == "length":
            limit = f"num_predict={self._num_predict} tokens"
            if not text.strip():
                # Another seed fares no better: the model thinks longer than it may.
                raise ProviderError(
                    f"{self.name} used up {limit} without an answer: raise `num_predict`"
                )
            return f"it was cut at {limit}"
        if not response.done:
            return "it broke off"
        return "" if reason in (None, "stop") else f"it ended with {reason!r}"

    def _check_prompt(self, prompt: str, counted: int | None, allocated: int | None) -> None:
        """Raises if the server cut the prompt, which it does in silence.

        Of a prompt that does not fit servers keep the end: about half a context of it or, old
        ones, a context less one. The context is what was really allocated: a model that was
        trained for less gets less than was asked for.
        """
        context = allocated or self._num_ctx
        read, sent = counted or 0, estimated_tokens(prompt)
        half = abs(read - (context // 2 + 2)) <= _CUT_SLACK
        if read >= context - 1 or (half and sent > context):
            raise ProviderError(
                f"Ollama at {self.host} cut the prompt: of about {sent} tokens it read {read}, "
                f"in a context of {context}; raise `num_ctx`, lower `top_k`, or take a model of "
                "a longer context"
            )


async def _digests(client: ollama.AsyncClient) -> dict[str, str]:
    listed = (await client.list()).models
    return {model.model: model.digest or "" for model in listed if model.model}


def _tagged(model: str) -> str:
    """The name as the server lists it: a model without a tag is its ``latest``."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"
