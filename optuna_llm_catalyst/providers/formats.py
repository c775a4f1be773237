"""How a request says what its reply shall look like, for servers that do not know all of it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import re
import time
from typing import Any
from typing import TypeVar

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import CompletionRequest


T = TypeVar("T")
#: What servers call the part of a request that they refuse.
_FORMAT = re.compile(r"\bformat\b|response_format|json_object|schema|grammar|\bpattern")


@dataclass(frozen=True)
class ReplyFormat:
    """What a request says of its reply.

    Attributes:
        kind: ``json_schema``, ``json_object`` (any JSON) or ``none``.
        schema: The JSON schema; None if there is none.
        details: What the completion's details tell of it.
    """

    kind: str
    schema: dict[str, Any] | None
    details: Mapping[str, Any] = field(default_factory=dict)


def in_format(
    request: CompletionRequest, first: int, send: Callable[[ReplyFormat, float], T]
) -> tuple[T, Mapping[str, Any], int]:
    """Makes a request in the strictest format that the server takes.

    Args:
        request: The request.
        first: The format to begin with: 0, or the number that the last request returned.
        send: Makes it in a format, within so many seconds.

    Returns:
        What ``send`` returned, what the completion's details tell of the format, and its number.

    Raises:
        ProviderError: The last one.
    """
    deadline = time.monotonic() + request.timeout
    schema, plain = dict(request.schema), _without_patterns(request.schema)
    formats = [
        ReplyFormat("json_schema", schema),
        ReplyFormat("json_schema", plain, {"format": "json_schema", "pattern": False}),
        ReplyFormat("json_object", plain, {"format": "json_object"}),
        ReplyFormat("none", None, {"format": "none"}),
    ]
    numbers = [i for i in range(first, len(formats)) if i != 1 or plain != schema or first == 1]
    for i in numbers:
        try:
            sent = send(formats[i], deadline - time.monotonic())
            return sent, formats[i].details, i
        except ProviderError as error:
            is_format = error.status in (400, 422, 500) and _FORMAT.search(str(error))
            if not is_format or i == numbers[-1]:
                raise
    raise AssertionError("The last format is sent or raises.")


def _without_patterns(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    return {key: _without_patterns(value) for key, value in schema.items() if key != "pattern"}
