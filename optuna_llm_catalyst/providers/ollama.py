"""A local LLM behind an Ollama server.

A server cuts a prompt that is too long without saying so, answers with HTTP 200 when a reply broke
off, and may return the answer of a model that thinks among its thoughts. All three are noticed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
import difflib
import os
import re
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers import ollama_client
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.providers.base import LimitedProvider
from optuna_llm_catalyst.providers.servers import in_format
from optuna_llm_catalyst.providers.servers import METADATA_TIMEOUT_S
from optuna_llm_catalyst.providers.servers import ReplyFormat


if TYPE_CHECKING:
    import ollama

T = TypeVar("T")
DEFAULT_MODEL = "gemma3:4b"
DEFAULT_NUM_CTX = 8192
_DEFAULT_URL = "http://127.0.0.1:11434"
#: How far from half the context the server's count of a prompt that it cut may lie.
_CUT_SLACK = 4
#: A duration as Go reads it.
_DURATION = re.compile(r"[+-]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)")
_MAX_NAMED = 10


class OllamaProvider(LimitedProvider):
    """Completions of one model of an Ollama server.

    What it does with the server raises a ``ProviderError`` where it fails, with the fix.

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
        keep_alive: How long the server keeps the model loaded between two requests, in seconds
            or as ``"30m"``; longer than a stage, or every proposal waits for the model to load.
    """

    _kind = "ollama"

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
        if isinstance(keep_alive, str) and not _DURATION.fullmatch(keep_alive):
            raise ValueError(
                '`keep_alive` must be a number of seconds or a duration as in "30m", got '
                f"{keep_alive!r}; the number -1 keeps the model loaded."
            )
        super().__init__(model, num_ctx, num_predict, temperature)
        named = (host or os.environ.get("OLLAMA_HOST") or "").strip()
        self._server = ollama_client.server_of(named or _DEFAULT_URL)
        self._sends_key = bool(named)
        self._think = think
        self._keep_alive = keep_alive
        self._format = 0  # Learnt from the server's answers.

    @property
    def host(self) -> str:
        """The server's URL without credentials."""
        return self._server.host

    def complete(self, request: CompletionRequest) -> Completion:
        limit = self._limit(request)
        options = {
            "num_ctx": self._num_ctx,
            "num_predict": limit,
            "temperature": self._temperature,
            "seed": request.seed,
        }
        (response, facts), told, self._format = in_format(
            request,
            self._format,
            lambda form, seconds: self._chat(request.prompt, options, form, seconds),
        )
        reason, message = response.done_reason, response.message
        if reason in ("load", "unload"):
            why = f"did not answer: it only {reason}ed {self.model!r}"
            raise ProviderError(f"{self._server.where} {why}", transient=True)
        self._check_prompt(request.prompt, response.prompt_eval_count, facts["context_length"])
        details = {
            **facts,
            **told,
            "options": options,
            "done_reason": reason,
            "prompt_tokens": response.prompt_eval_count,
            "reply_tokens": response.eval_count,
            "load_seconds": (response.load_duration or 0) / 1e9,
        }
        text, thoughts = message.content or "", message.thinking or ""
        completion = self._completion(text, thoughts, reason, limit, details)
        # A server that gives up half way answers with HTTP 200.
        broke_off = not response.done and reason != "length"
        problem = "it broke off" if broke_off else completion.problem
        return replace(completion, model=response.model or self.model, problem=problem)

    def models(self) -> dict[str, str]:
        """The server's models, the newest first: name to digest."""
        return self._run(ollama_client.digests)

    def check(self) -> None:
        """Checks that the server answers and has the model, under whatever name it takes."""
        self._run(lambda client: client.show(self.model))

    def installed_chat_model(self) -> str | None:
        """The newest model of the server that can chat and runs there; None if there is none."""
        return self._run(ollama_client.first_chat_model)

    def model_context_length(self) -> int | None:
        """The context length that the model was trained for; None if the server does not tell."""
        return self._run(lambda client: ollama_client.trained_context_of(client, self.model))

    def server_version(self) -> str:
        """The server's version."""

        async def version(client: ollama.AsyncClient) -> str:
            # The client has no method for it.
            return str((await client._client.get("/api/version")).json()["version"])

        return self._run(version)

    def _run(self, work: ollama_client.Work[T], timeout: float = METADATA_TIMEOUT_S) -> T:
        try:
            return ollama_client.run(self._server, work, timeout, sends_key=self._sends_key)
        except ProviderError as error:
            # Another server on that port also says "not found", of its own pages.
            if error.status == 404 and re.search("model .* not found", str(error)):
                raise ProviderError(self._missing()) from error
            raise

    def _missing(self) -> str:
        names: list[str] = []
        with suppress(ProviderError):
            names += self.models()
        near = difflib.get_close_matches(self.model, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        more = ", …" if len(names) > _MAX_NAMED else ""
        listed = ", ".join(map(repr, names[:_MAX_NAMED])) or "no model"
        return (
            f"{self._server.where} has no model {self.model!r}{hint}: get it with "
            f"`ollama pull {self.model}`; installed: {listed}{more}"
        )

    def _chat(
        self, prompt: str, options: dict[str, Any], form: ReplyFormat, timeout: float
    ) -> tuple[Any, dict[str, Any]]:
        """A response, and the model's digest and context; None where the server tells none."""
        responses: list[ollama.ChatResponse] = []
        facts: dict[str, Any] = {"digest": None, "context_length": None}

        async def work(client: ollama.AsyncClient) -> None:
            response = await client.chat(
                self.model,
                messages=[{"role": "user", "content": prompt}],
                stream=False,
                format="json" if form.kind == "json_object" else form.schema,
                options=options,
                think=self._think,
                keep_alive=self._keep_alive,
            )
            responses.append(response)
            await ollama_client.learn(client, self.model, self._num_ctx, facts)

        try:
            self._run(work, timeout)
        except ProviderError:
            if not responses:
                raise
        return responses[0], facts

    def _check_prompt(self, prompt: str, counted: int | None, allocated: int | None) -> None:
        """Raises if the server cut the prompt.

        Of one that does not fit servers keep the end: about half a context of it or, old ones, a
        context less one. A model that was trained for less gets less than was requested.
        """
        context = allocated or self._num_ctx
        read, sent = counted or 0, estimated_tokens(prompt)
        half = abs(read - (context // 2 + 2)) <= _CUT_SLACK
        if read >= context - 1 or (half and sent > context):
            raise ProviderError(
                f"{self._server.where} cut the prompt: of about {sent} tokens it read {read}, "
                f"in a context of {context}; raise `num_ctx`, lower `top_k`, or take a model of "
                "a longer context"
            )
