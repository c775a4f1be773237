"""What a reply shall look like, and from a reply to prompts that can be trained. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from itertools import islice
import json
import re
import string
from typing import Any
import unicodedata

from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.providers.base import Completion
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


@dataclass(frozen=True)
class JudgedReply:
    """What a reply is worth: its new prompts, and what is wrong with it."""

    usable: tuple[RestartPrompt, ...] = ()
    too_long: tuple[RestartPrompt, ...] = ()  # They had to be cut to fit.
    rejected: tuple[tuple[str, str], ...] = ()  # Texts that are not usable as they are, and why.
    problem: str = ""  # Why nothing is usable, or what else is odd.


def schema(n_candidates: int, pattern: str = "") -> dict[str, Any]:
    """The JSON schema of a reply: flat, as local servers honour little more."""
    prompts = {
        "type": "array",
        "items": {"type": "string", **({"pattern": pattern} if pattern else {})},
        "minItems": n_candidates,
        "maxItems": n_candidates,
    }
    return {"type": "object", "properties": {"prompts": prompts}, "required": ["prompts"]}


@lru_cache(maxsize=8)
def pattern(space: PromptSpace) -> str:
    """A regular expression for prompts of words, or "" if it would be too long.

    It bounds the words of a prompt and the letters of a word: without a bound, a small model
    that a server holds to the pattern runs on. Its letters are those that the vocabulary uses.
    There is none if they come from many scripts, or if the vocabulary has no whole words.
    """
    text = space.vocabulary.decode(range(space.vocab_size))
    counts = Counter(c for c in text if _is_letter(c))
    common = {c for c, count in counts.items() if count >= _RARE * counts.total()}
    if common & {*string.ascii_letters}:
        common |= {*string.ascii_letters}
    n_rare = sum(count for c, count in counts.items() if c not in common)
    ranges = _ranges(common)
    if not space.whole_words or len(ranges) > _MAX_RANGES or n_rare > _MAX_RARE * counts.total():
        return ""
    least, most = _WORD_LENGTHS
    longest = min(max(least, *map(len, space.words)), most)
    letters = "".join(ranges)
    word = f"[{letters}][{letters}']{{0,{longest - 1}}}"
    length = space.num_virtual_tokens
    return f"^{word}( {word}){{1,{length - 1}}}$" if length > 1 else f"^{word}$"


def _ranges(letters: set[str]) -> list[str]:
    """Letters as ranges of a character class: "a-z", "ß", …"""
    ranges = []
    codes = enumerate(sorted(map(ord, letters)))
    for _, run in groupby(codes, lambda pair: pair[1] - pair[0]):
        first, *rest = (chr(code) for _, code in run)
        ranges.append(f"{first}-{rest[-1]}" if rest else first)
    return ranges


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
    """The prompts of a reply, cleaned, in order and without repetitions.

    Reads ``{"prompts": [...]}`` as the whole reply, in a code fence, or after thinking or chat;
    an InvalidReplyError if there is no such object, or no prompt in it.
    """
    if len(reply) > MAX_REPLY:
        raise InvalidReplyError(f"the reply has {len(reply)} characters, over {MAX_REPLY}")
    try:
        # If the whole reply is one JSON object, tags in its texts are text.
        prompts = decode(Reply, json.loads(reply)).prompts
    except (ValueError, RecursionError):
        prompts = _find_prompts(reply)
    cleaned = dict.fromkeys(filter(None, (one_line(prompt[:MAX_PROMPT]) for prompt in prompts)))
    if not cleaned:
        raise InvalidReplyError("the reply's list of prompts is empty")
    return list(cleaned)


def _without_thinking(reply: str) -> str:
    """The reply without its thoughts, which may hold drafts of an answer.

    Chat templates put the opening tag into the prompt, and a reply that was cut lacks the closing
    one: all before the last closing tag and all after an opening one is thought.
    """
    *_, answer = _THOUGHT.split(reply)
    answer, *thoughts = _THINKING.split(answer, maxsplit=1)
    if thoughts and not answer.strip():
        raise InvalidReplyError("the reply is all thinking, without an answer")
    if not answer.strip():
        thought = " after its thinking" if reply.strip() else ""
        raise InvalidReplyError(f"the reply is empty{thought}")
    return answer


def _find_prompts(reply: str) -> list[str]:
    """The prompts of the first JSON object that has some, other than examples of the form."""
    found = None
    decoder, text = json.JSONDecoder(), _without_thinking(reply)
    for brace in islice(re.finditer(r"\{", text), _MAX_OBJECTS):
        try:
            found = decode(Reply, decoder.raw_decode(text, brace.start())[0]).prompts
        except (ValueError, RecursionError):
            continue
        if not all(map(is_example, found)):
            break
    if found is None:
        form = '{"prompts": [strings]}'
        raise InvalidReplyError(f"the reply has no object {form}: {reply[:120]!r}")
    return found


def judge(completion: Completion, request: ProposalRequest) -> JudgedReply:
    """Sorts the prompts of a reply into what can be used and what cannot."""
    try:
        texts = parse(completion.text)
    except InvalidReplyError as error:
        return JudgedReply(problem=completion.problem or f"{type(error).__name__}: {error}")
    judged = [(text, *_candidate(text, request)) for text in texts]
    rejected = tuple((text, reason) for text, _, reason in judged if reason)
    # A dict keeps their order. Prompts of the same tokens are equal.
    prompts = [prompt for _, prompt, _ in judged if prompt]
    usable = dict.fromkeys(prompt for prompt in prompts if not prompt.n_truncated)
    too_long = dict.fromkeys(prompt for prompt in prompts if prompt not in usable)
    problem = completion.problem
    if not usable:
        reasons = Counter(reason for _, reason in rejected)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        problem = f"none of the {len(texts)} prompts can be used as it is: {listed}"
    return JudgedReply(tuple(usable), tuple(too_long), rejected, problem)


def _candidate(text: str, request: ProposalRequest) -> tuple[RestartPrompt | None, str]:
    """The prompt of a text, None if it cannot be trained, and what is wrong with it."""
    space = request.space
    if is_example(text):
        return None, "it repeats the example of the form"
    try:
        prompt = space.from_text(text)
    except ValueError:
        return None, "no word of it is in the vocabulary"
    if not has_words(prompt, space):
        needed = "two common words" if space.num_virtual_tokens > 1 else "a common word"
        return None, f"it needs {needed} and little else"
    prompt = space.with_tokens(prompt, request.fixed)
    if prompt.token_ids in request.history.tried:
        return None, "it was tried before"
    n = prompt.n_truncated
    return prompt, f"it is {n} tokens too long" if n else ""


def has_words(prompt: RestartPrompt, space: PromptSpace) -> bool:
    """Whether two of a prompt's tokens are whole words, and most of its characters letters.

    One word will do where a prompt has one token, and anything if the vocabulary has no words.
    """
    if not space.whole_words:
        return True
    n_words = 0
    for token_id in prompt.token_ids[: len(prompt.token_ids) - prompt.n_padding]:
        text = space.vocabulary.decode([token_id]).strip()
        # Beyond ASCII, any token of letters counts as a word.
        n_words += token_id in space.whole_words or (text.isalpha() and not text.isascii())
    visible = "".join(space.without_padding(prompt).split())
    n_letters = sum(map(_is_letter, visible))
    return n_words >= min(2, space.num_virtual_tokens) and 2 * n_letters > len(visible)


def _is_letter(character: str) -> bool:
    """Whether a character is a letter, or a mark on one."""
    return unicodedata.category(character)[0] in "LM"
