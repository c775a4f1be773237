"""Restart prompts from an LLM: history to meta-prompt, to reply, to candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import json
import time
from typing import Any

import numpy as np

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import Proposal
from optuna_llm_catalyst.proposers.base import ProposalError
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.meta_prompt import BudgetError
from optuna_llm_catalyst.proposers.pools import edit_record
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.providers import retrying
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import DEFAULT_TIMEOUT_S
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.providers.base import Provider


#: With less time than this no answer is to be expected.
_MIN_TIMEOUT_S = 0.05
#: Characters of what the LLM is told of its last answer, and tokens to keep free for it.
_MAX_PROBLEM = 300
_MAX_ERROR = 2_000
_MAX_DETAILS = 4_000
_CORRECTION_TOKENS = 150


class LLMProposer:
    """Asks an LLM for restart prompts.

    Two kinds of failure are met in two ways. When the way to the LLM fails, the same request is
    repeated after a pause. When the reply is of no use (no JSON, nothing new, everything too
    long, …), the LLM is asked again with another seed and told what was wrong. One deadline is
    for all of it.

    Args:
        provider: Where completions come from.
        task_description: What the frozen model shall do, in one or two sentences.
        labels: The labels it chooses among.
        examples: Texts of the task with their labels, to show to the LLM. They leave the
            training process, to the provider and into the study's records: none by default.
        sections: What the meta-prompt holds, by name: ``examples``, ``mistakes``, ``signals``,
            ``directions``, ``ranked_prompts``, ``in_flight``, ``pools``; ``task`` and
            ``request`` are always part of it.
        edit_horizon: Stages over which the edit budget of ``pools`` shrinks.
        timeout: Seconds for one proposal: loading the model, retries and re-asks included.
        max_attempts: How often a trial asks at most, because replies are of no use.
        max_tries: How often a request is sent at most, because the way to the LLM fails.
        backoff: Seconds before a request is repeated; doubled each time, with jitter.
    """

    def __init__(
        self,
        provider: Provider,
        task_description: str = "",
        *,
        labels: Sequence[str] = (),
        examples: Sequence[tuple[str, str]] = (),
        sections: Sequence[str] = DEFAULT_SECTIONS,
        edit_horizon: int = 20,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_attempts: int = 3,
        max_tries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        check_sections(sections)
        if isinstance(labels, str):
            raise ValueError(f"`labels` must be a list of names, got the text {labels!r}.")
        if isinstance(examples, str) or not all(len(pair) == 2 for pair in examples):
            raise ValueError("`examples` must be a list of pairs of a text and its label.")
        for name, value, least in (
            ("edit_horizon", edit_horizon, 1),
            ("max_attempts", max_attempts, 1),
            ("max_tries", max_tries, 1),
            ("backoff", backoff, 0),
        ):
            if not value >= least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"`timeout` must be a positive number of seconds, got {timeout}.")
        self._provider = provider
        self.options = MetaPromptOptions(
            task_description, tuple(labels), tuple(examples), tuple(sections), edit_horizon
        )
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._max_tries = max_tries
        self._backoff = backoff

    @property
    def max_meta_prompt_tokens(self) -> int | None:
        """Tokens that the meta-prompt may have, with room for a word on the last answer."""
        most = self._provider.max_prompt_tokens
        return None if most is None else most - _CORRECTION_TOKENS

    def meta_prompt(self, request: ProposalRequest) -> meta_prompt.MetaPrompt:
        """What the LLM would be asked.

        Raises:
            BudgetError: If the instructions alone do not fit into the LLM's context.
        """
        return meta_prompt.build(request, self.options, max_tokens=self.max_meta_prompt_tokens)

    def propose(self, request: ProposalRequest) -> Proposal:
        deadline = time.monotonic() + self._timeout
        attempts: list[dict[str, Any]] = []
        details: dict[str, Any] = {"proposer": "llm", "provider": self._provider.name}
        try:
            asked = self.meta_prompt(request)
        except BudgetError as error:
            raise ProposalError(str(error), details) from error
        details |= asked.facts() | {"meta_prompt": records.clip(asked.text), "attempts": attempts}
        judged = JudgedReply()
        too_long: tuple[RestartPrompt, ...] = ()
        while len(attempts) < self._max_attempts:
            left = deadline - time.monotonic()
            if attempts and left < _MIN_TIMEOUT_S:
                problem = f"{judged.problem}; the {self._timeout:g} s for a proposal are over"
                judged = replace(judged, problem=problem)
                break
            completion_request = CompletionRequest(
                prompt=asked.text + _correction(judged.problem),
                schema=reply.schema(request.n_candidates),
                seed=_seed(request.seed, len(attempts)),
                trial_number=request.trial_number,
                proposal_index=len(request.history.proposals),
                attempt=len(attempts),
                timeout=left,
            )
            try:
                judged = self._ask(completion_request, request, attempts)
            except Exception as error:  # Providers of third parties raise whatever.
                # A server may have written it: it goes to logs and terminals.
                message = records.clip(one_line(str(error)), _MAX_ERROR)
                problem = f"{type(error).__name__}: {message}"
                attempts.append({"seed": completion_request.seed, "error": message})
                judged = replace(judged, problem=problem)
                break
            too_long = judged.too_long or too_long
            if judged.usable:
                break
        # What is too long is cut to the space's length: better than none, and recorded.
        prompts = judged.usable + judged.too_long or too_long
        if not prompts:
            raise ProposalError(judged.problem, details)
        prompts = prompts[: request.n_candidates]
        if "pools" in asked.sections:
            details |= edit_record(request, self.options.edit_horizon, prompts)
        return Proposal(prompts, "llm", details)

    def _ask(
        self,
        completion_request: CompletionRequest,
        request: ProposalRequest,
        attempts: list[dict[str, Any]],
    ) -> JudgedReply:
        """One reply, judged; appended to the record of attempts."""
        started = time.monotonic()
        completion, n_tries = retrying.complete(
            self._provider,
            completion_request,
            max_tries=self._max_tries,
            backoff=self._backoff,
        )
        stopped = records.clip(one_line(completion.problem), _MAX_PROBLEM)
        completion = replace(completion, problem=stopped)
        judged = judge(completion, request)
        attempts.append(
            {
                **_short(completion.details),
                "seed": completion_request.seed,
                "seconds": round(time.monotonic() - started, 3),
                "tries": n_tries,
                "model": records.clip(completion.model, _MAX_PROBLEM),
                "reply": records.clip(completion.text),
                "problem": judged.problem,
                "rejected": [list(pair) for pair in judged.rejected],
                **({"server_problem": completion.problem} if completion.problem else {}),
            }
        )
        return judged


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
    usable: dict[tuple[int, ...], RestartPrompt] = {}
    too_long: dict[tuple[int, ...], RestartPrompt] = {}
    rejected = []
    for text in texts:
        try:
            prompt = request.space.from_text(text)
        except ValueError:
            rejected.append((text, "no word of it is in the vocabulary"))
            continue
        if prompt.token_ids in request.history.tried:
            rejected.append((text, "it was tried before"))
        elif prompt.n_truncated:
            rejected.append((text, f"it is {prompt.n_truncated} tokens too long"))
            too_long.setdefault(prompt.token_ids, prompt)
        else:
            usable.setdefault(prompt.token_ids, prompt)
    problem = completion.problem
    if not usable:
        reasons = Counter(reason for _, reason in rejected)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        problem = f"none of the {len(texts)} prompts can be used as it is: {listed}"
    cut = tuple(prompt for token_ids, prompt in too_long.items() if token_ids not in usable)
    return JudgedReply(tuple(usable.values()), cut, tuple(rejected), problem)


def _short(details: Mapping[str, Any]) -> dict[str, Any]:
    """A provider's facts for the record; a server's may be of any size."""
    facts = records.jsonable(details)
    if len(json.dumps(facts)) <= _MAX_DETAILS:
        return facts
    return {"details": records.clip(repr(facts), _MAX_DETAILS)}


def _correction(problem: str) -> str:
    """What is added to the meta-prompt after a reply that was of no use."""
    if not problem:
        return ""
    for length in range(_MAX_PROBLEM, 0, -20):
        text = (
            f"\n\nYour last answer could not be used: {problem[:length]}\n"
            "Answer again, with other prompts, and with JSON only."
        )
        if estimated_tokens(text) <= _CORRECTION_TOKENS:
            break
    return text


def _seed(seed: int, attempt: int) -> int:
    """The first attempt's seed is the request's own, later ones derive from it."""
    if attempt == 0:
        return seed
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0]) & 0x7FFFFFFF
