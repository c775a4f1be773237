"""The interface to an LLM: one completion of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import math
import re
from typing import Any
from typing import Protocol

from optuna_llm_catalyst.exceptions import ProviderError


DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class CompletionRequest:
    """One request to an LLM.

    Attributes:
        prompt: The whole prompt, sent as one user message.
        schema: JSON schema that the reply shall follow; a hint, never a guarantee.
        seed: Non-negative 31-bit sampling seed.
        trial_number: The trial that it is for.
        proposal_index: How many trials of the study made requests before.
        attempt: How many replies to this trial could not be used.
        timeout: Seconds after which the provider must have answered or given up.
        max_tokens: Tokens that a reply needs at most; a provider's own limit may be lower.
    """

    prompt: str
    schema: Mapping[str, Any]
    seed: int
    trial_number: int = 0
    proposal_index: int = 0
    attempt: int = 0
    timeout: float = DEFAULT_TIMEOUT_S
    max_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """What an LLM answered.

    Attributes:
        text: The reply, as it came.
        model: The model that wrote it.
        problem: Why the server says that the reply is not whole; empty if it does not.
        details: JSON-able facts for the record: digest, options, ``prompt_tokens``, …
    """

    text: str
    model: str
    problem: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Provider(Protocol):
    """One LLM. Holds configuration only, and survives pickling and copying."""

    @property
    def name(self) -> str:
        """The kind of provider and the model, as in ``ollama:gemma3:4b``."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """Tokens of its own tokenizer that a prompt may have; None for no limit."""

    def complete(self, request: CompletionRequest) -> Completion:
        """Makes a request once, without retries, and returns within ``request.timeout`` seconds.

        Raises:
            ProviderError: If there is no reply; ``transient`` if the same request may succeed a
                little later.
        """


class LimitedProvider:
    """What the providers of a model have in common: its name and its limits."""

    _kind = ""
    _cut_at = "num_predict={} tokens"

    def __init__(self, model: str, num_ctx: int, num_predict: int, temperature: float) -> None:
        if not 0 < num_predict < num_ctx:
            raise ValueError(
                "`num_predict` must be positive and below `num_ctx`, got "
                f"{num_predict} and {num_ctx}."
            )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0, got {temperature}.")
        self.model = model
        self._num_ctx = num_ctx
        self._num_predict = num_predict
        self._temperature = temperature
        self._thinks = False  # Learnt from replies that were cut.

    @property
    def name(self) -> str:
        return f"{self._kind}:{self.model}"

    @property
    def max_prompt_tokens(self) -> int:
        return self._num_ctx - self._num_predict

    def _limit(self, request: CompletionRequest) -> int:
        """Tokens that a reply may have; a model that thinks needs more than its reply does."""
        needed = None if self._thinks else request.max_tokens
        return min(self._num_predict, needed or self._num_predict)

    def _completion(
        self, text: str, thoughts: str, reason: str | None, limit: int, details: dict[str, Any]
    ) -> Completion:
        """A completion that ended for a reason; the text may be found among the thoughts."""
        has_thought = thoughts.strip() or not text.strip() or text.lstrip().startswith("<think>")
        self._thinks |= reason == "length" and bool(has_thought)
        if thoughts.strip() and not text.strip():
            text = thoughts
            details["reply_from"] = "thinking"
        problem = "" if reason in (None, "", "stop") else f"it ended with {reason!r}"
        if reason == "length":
            cut_at = self._cut_at.format(limit)
            problem = f"it was cut at {cut_at}"
            if not text.strip() and limit == self._num_predict:
                # Another seed fares no better: the model thinks longer than it may.
                raise ProviderError(
                    f"{self.name} used up {cut_at} without an answer: raise `num_predict`"
                )
        return Completion(text, self.model, problem, details)


def estimated_tokens(text: str) -> int:
    """Tokens of a text in an LLM's vocabulary, rather too many than too few.

    Four letters a token within an English word; a token for each digit, sign and line feed, and
    for a blank before a digit; two for three UTF-8 bytes of other scripts. Measured on the
    tokenizers of Gemma 3, Llama 3 and Qwen 3.
    """
    words = sum(math.ceil(len(word) / 4) for word in re.findall("[A-Za-z]+", text))
    signs = len(re.findall(r"[!-@\[-`{-~\n]", text))
    blanks = len(re.findall(r"\s(?=[^A-Za-z!-/:-@\[-`{-~])", text))
    n_bytes = sum(len(c.encode(errors="replace")) for c in text if not c.isascii())
    return words + signs + blanks + math.ceil(2 * n_bytes / 3)
