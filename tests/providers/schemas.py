"""A schema with a pattern, the same without it, and what happens when a server refuses one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import pickle
from typing import Any

from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import Provider


PATTERNED = {
    "type": "object",
    "properties": {
        "prompts": {"type": "array", "maxItems": 2, "items": {"type": "string", "pattern": "^a"}}
    },
}
PLAIN = {
    "type": "object",
    "properties": {"prompts": {"type": "array", "maxItems": 2, "items": {"type": "string"}}},
}


def assert_steps_down_once(
    provider: Provider,
    request: CompletionRequest,
    reply: str,
    formats: Callable[[], Sequence[Any]],
    sent: Sequence[Any],
    details: Mapping[str, Any],
) -> None:
    """The provider steps down once, says so and remembers it; copies may learn it again.

    ``formats`` are those that the server got so far, ``sent`` those of the first request.
    """
    for _ in range(2):
        completion = provider.complete(request)
        told = completion.details
        assert completion.text == reply
        assert {k: told[k] for k in ("format", "pattern") if k in told} == details
    assert formats() == [*sent, sent[-1]]
    for twin in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
        assert twin.complete(request).text == reply
