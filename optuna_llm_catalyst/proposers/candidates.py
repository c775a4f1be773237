"""From a reply to the prompts that can be trained, and why the others cannot. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.providers.base import Completion


@dataclass(frozen=True)
class JudgedReply:
    """What a reply is worth.

    Attributes:
        usable: New prompts that fit into the space.
        too_long: New prompts that had to be cut to fit.
        rejected: Texts that are not usable as they are, and why.
        problem: Why nothing is usable, or what else is odd; empty if all is well.
    """

    usable: tuple[RestartPrompt, ...] = ()
    too_long: tuple[RestartPrompt, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def judge(completion: Completion, request: ProposalRequest) -> JudgedReply:
    """Sorts the prompts of a reply into what can be used and what cannot."""
    try:
        texts = reply.parse(completion.text)
    except InvalidReplyError as error:
        return JudgedReply(problem=completion.problem or f"{type(error).__name__}: {error}")
    judged = [(text, *_candidate(text, request)) for text in texts]
    rejected = tuple((text, reason) for text, _, reason in judged if reason)
    prompts = [prompt for _, prompt, _ in judged if prompt]
    # A dict keeps their order. Prompts of the same tokens are equal.
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
    if reply.is_example(text):
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
    written = prompt.token_ids[: len(prompt.token_ids) - prompt.n_padding]
    n_words = sum(_is_word(token_id, space) for token_id in written)
    visible = "".join(space.without_padding(prompt).split())
    n_letters = sum(map(reply.is_letter, visible))
    return n_words >= min(2, space.num_virtual_tokens) and 2 * n_letters > len(visible)


def _is_word(token_id: int, space: PromptSpace) -> bool:
    """Whether a token is a whole word; beyond ASCII, any token of letters counts as one."""
    text = space.vocabulary.decode([token_id]).strip()
    return token_id in space.whole_words or (text.isalpha() and not text.isascii())
