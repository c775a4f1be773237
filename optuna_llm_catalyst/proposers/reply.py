"""What a reply shall look like, and from a reply to candidate prompts. Pure: a reply is data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
import json
import re
import string
from typing import Any
import unicodedata

from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.schema import decode


#: As long as what a record keeps of a reply: a clipped one is too long when it is replayed, too.
MAX_REPLY = 32_000
MAX_PROMPT = 1_000
#: Two prompts of the form that is wanted, far from any task: a copy of them is recognised.
EXAMPLES = ("wooden boats cross the quiet lake", "seven bakers sing before dawn")
_MAX_OBJECTS = 50
_THINKING = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
#: Letters of a word in the pattern: at least, whatever the vocabulary, and at most.
_WORD_LENGTHS = (12, 24)
#: A letter is rare if it is less than this share of the vocabulary's letters.
_RARE = 1 / 5_000
_MAX_RARE = 0.03
_MAX_RANGES = 24


@dataclass(frozen=True)
class Reply:
    """The JSON object that a reply consists of."""

    prompts: list[str]


def schema(n_candidates: int, pattern: str = "") -> dict[str, Any]:
    """The JSON schema of a reply: flat, as local servers honour little more."""
    return {
        "type": "object",
        "properties": {
            "prompts": {
                "type": "array",
                "items": {"type": "string", **({"pattern": pattern} if pattern else {})},
                "minItems": n_candidates,
                "maxItems": n_candidates,
            }
        },
        "required": ["prompts"],
    }


@lru_cache(maxsize=8)
def pattern(space: PromptSpace) -> str:
    """A regular expression for prompts of words, or "" where there is no short one.

    It bounds the words of a prompt and the letters of a word: without a bound, a small model
    that a server holds to the pattern runs on. Its letters are those that the vocabulary uses.
    There is none if they come from many scripts, or if the vocabulary has no whole words.
    """
    text = space.vocabulary.decode(range(space.vocab_size))
    counts = Counter(c for c in text if is_letter(c))
    common = {c for c, count in counts.items() if count >= _RARE * counts.total()}
    if common & {*string.ascii_letters}:
        common |= {*string.ascii_letters}
    n_rare = sum(count for c, count in counts.items() if c not in common)
    ranges = list(_ranges(common))
    if not space.whole_words or len(ranges) > _MAX_RANGES or n_rare > _MAX_RARE * counts.total():
        return ""
    least, most = _WORD_LENGTHS
    longest = min(max(least, *map(len, space.words)), most)
    letters = "".join(ranges)
    word = f"[{letters}][{letters}']{{0,{longest - 1}}}"
    length = space.num_virtual_tokens
    return f"^{word}( {word}){{1,{length - 1}}}$" if length > 1 else f"^{word}$"


def max_tokens(n_candidates: int, num_virtual_tokens: int) -> int:
    """Tokens that a reply needs at most: an LLM's tokenizer may cut words into more pieces."""
    return 64 + n_candidates * (4 * num_virtual_tokens + 16)


def examples(n_candidates: int, num_virtual_tokens: int) -> list[str]:
    """Prompts that show the form of an answer, none longer than a prompt may be."""
    return [" ".join(text.split()[:num_virtual_tokens]) for text in EXAMPLES[:n_candidates]]


def is_example(text: str) -> bool:
    """Whether a prompt only repeats an example of the form, or is dots."""
    words = re.findall(r"\w+", text.casefold())
    copied = bool(words) and any(words == each.split()[: len(words)] for each in EXAMPLES)
    return copied or not text.strip(" .…")


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
    if prompts is None:
        raise InvalidReplyError(
            f'the reply has no object {{"prompts": [strings]}}: {reply[:120]!r}'
        )
    cleaned = dict.fromkeys(filter(None, (one_line(prompt[:MAX_PROMPT]) for prompt in prompts)))
    if not cleaned:
        raise InvalidReplyError("the reply's list of prompts is empty")
    return list(cleaned)


def _whole_reply(reply: str) -> list[str] | None:
    """The prompts if the reply is one JSON object: tags in its texts are text."""
    try:
        return decode(Reply, json.loads(reply)).prompts
    except (ValueError, RecursionError):
        return None


def _without_thinking(reply: str) -> str:
    """The reply without its thoughts, which may hold drafts of an answer.

    Chat templates put the opening tag into the prompt, and a reply that was cut lacks the closing
    one: all before the last closing tag and all after an opening one is thought.
    """
    *_, answer = _THOUGHT.split(reply)
    answer, *thoughts = _THINKING.split(answer, maxsplit=1)
    if thoughts and not answer.strip():
        raise InvalidReplyError("the reply is all thinking, without an answer")
    return answer


def _find_prompts(text: str) -> list[str] | None:
    """The prompts of the first JSON object that has some, other than examples of the form."""
    found = None
    decoder = json.JSONDecoder()
    starts = (match.start() for match in re.finditer(r"\{", text))
    for start, _ in zip(starts, range(_MAX_OBJECTS), strict=False):
        try:
            found = decode(Reply, decoder.raw_decode(text, start)[0]).prompts
        except (ValueError, RecursionError):
            continue
        if not all(map(is_example, found)):
            break
    return found


def is_letter(character: str) -> bool:
    """Whether a character is a letter, or a mark on one."""
    return unicodedata.category(character)[0] in "LM"


def _ranges(letters: Iterable[str]) -> Iterator[str]:
    """Letters as ranges of a character class: "a-z", "ß", …"""
    codes = enumerate(sorted(map(ord, letters)))
    for _, run in groupby(codes, lambda pair: pair[1] - pair[0]):
        first, *rest = (chr(code) for _, code in run)
        yield f"{first}-{rest[-1]}" if rest else first
