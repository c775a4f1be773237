"""The seam to an LLM: one completion of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol


@dataclass(frozen=True)
class CompletionRequest:
    """What an LLM is asked.

    Attributes:
        prompt: The whole prompt, sent as one user message.
        schema: JSON schema that the reply shall follow; a hint, never a guarantee.
        seed: Non-negative 31-bit sampling seed.
        trial_number: The trial for which it is asked.
        call_index: How many trials of the study asked an LLM before.
    """

    prompt: str
    schema: Mapping[str, Any]
    seed: int
    trial_number: int = 0
    call_index: int = 0


@dataclass(frozen=True)
class Completion:
    """What an LLM answered.

    Attributes:
        text: The reply, as it came.
        model: The model that wrote it.
        details: JSON-able facts for the record: digest, options, token counts, …
    """

    text: str
    model: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Provider(Protocol):
    """One LLM. Holds configuration only, and survives pickling and copying."""

    @property
    def name(self) -> str:
        """The kind of provider and the model, as in ``ollama:gemma3:4b``."""
        ...

    def complete(self, request: CompletionRequest) -> Completion:
        """Asks once.

        Raises:
            ProviderError: For everything that can go wrong on the way to a whole reply.
        """
        ...
