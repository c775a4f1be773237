"""An LLM's reply to candidate prompts. Pure: the reply is data, never evaluated.

Validated by hand rather than with pydantic, so that the core does not need it; the
schema is one key with a list of strings.
"""

from __future__ import annotations

import json
import re
from typing import Any

from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import one_line


#: As long as what a record keeps of a reply: a clipped one is too long when it is replayed, too.
MAX_REPLY = 32_000
MAX_PROMPT = 1_000
_MAX_OBJECTS = 50
_THINKING = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


def schema(n_candidates: int) -> dict[str, Any]:
    """The JSON schema of a reply: flat, as local servers honour little more."""
    return {
        "type": "object",
        "properties": {
            "prompts": {
                "type": "array",
                "items": {"type": "string"},
                "minItems": n_candidates,
                "maxItems": n_candidates,
            }
        },
        "required": ["prompts"],
    }


def parse(reply: str) -> list[str]:
    """Returns the prompts of a reply, cleaned, in order and without repetitions.

    Reads ``{"prompts": [...]}`` as the whole reply, in a code fence, or after thinking or chat.

    Raises:
        InvalidReplyError: If there is no such object, or no prompt in it.
    """
    if len(reply) > MAX_REPLY:
        raise InvalidReplyError(f"the reply has {len(reply)} characters, over {MAX_REPLY}")
    prompts = _whole_reply(reply)
    if prompts is None:
        text = _without_thinking(reply).strip()
        if not text:
            thought = " after its thinking" if reply.strip() else ""
            raise InvalidReplyError(f"the reply is empty{thought}")
        prompts = _find_prompts(text)
    if not isinstance(prompts, list) or not all(isinstance(item, str) for item in prompts):
        raise InvalidReplyError(
            f'the reply has no object {{"prompts": [strings]}}: {reply[:120]!r}'
        )
    cleaned = dict.fromkeys(filter(None, (one_line(prompt[:MAX_PROMPT]) for prompt in prompts)))
    if not cleaned:
        raise InvalidReplyError("the reply's list of prompts is empty")
    return list(cleaned)


def _whole_reply(reply: str) -> Any:
    """The value of ``prompts`` if the reply is one JSON object: tags in its texts are text."""
    try:
        return _prompts_of(json.loads(reply))
    except (ValueError, RecursionError):
        return None


def _without_thinking(reply: str) -> str:
    """The reply without its thoughts, in which drafts of an answer would be found.

    Chat templates put the opening tag into the prompt, and a reply that was cut lacks the closing
    one: all before the last closing tag and all after an opening one is thought.
    """
    *_, answer = _THOUGHT.split(reply)
    answer, *thoughts = _THINKING.split(answer, maxsplit=1)
    if thoughts and not answer.strip():
        raise InvalidReplyError("the reply is all thinking, without an answer")
    return answer


def _find_prompts(text: str) -> Any:
    """The value of ``prompts`` in the first JSON object of the text that has one."""
    decoder = json.JSONDecoder()
    starts = (match.start() for match in re.finditer(r"\{", text))
    for start, _ in zip(starts, range(_MAX_OBJECTS), strict=False):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        prompts = _prompts_of(value)
        if prompts is not None:
            return prompts
    return None


def _prompts_of(value: Any) -> Any:
    """What a JSON value has under ``prompts``; None if nothing.

    The form of the answer, ``["...", "..."]``, said back to us is nothing.
    """
    prompts = value.get("prompts") if isinstance(value, dict) else None
    is_echo = isinstance(prompts, list) and prompts != [] and all(p == "..." for p in prompts)
    return None if is_echo else prompts
