"""Restart prompts from an LLM: history to meta-prompt, to reply, to candidates."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import time
from typing import Any

import numpy as np

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import Proposal
from optuna_llm_catalyst.proposers.base import ProposalError
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.meta_prompt import MetaPrompt
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import edit_budget
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.proposers.sections import N_REFINED
from optuna_llm_catalyst.providers import retrying
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import DEFAULT_TIMEOUT_S
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.providers.base import Provider


#: Shorter timeouts are not worth a request.
_MIN_TIMEOUT_S = 0.05
#: Characters of what the LLM is told of its last reply, and tokens to keep free for it.
_MAX_PROBLEM = 300
_MAX_ERROR = 2_000
_MAX_DETAILS = 4_000
_CORRECTION_TOKENS = 150
_CORRECTION = (
    "\n\nYour last answer could not be used: {}\n"
    "Answer again, with other prompts, and with JSON only."
)


class LLMProposer:
    """Proposes restart prompts that an LLM wrote.

    A request that does not get through is repeated after a pause. A reply of no use (no JSON,
    no words, nothing new, everything too long, …) leads to another attempt, with another seed and
    with what was wrong. One deadline is for all of it.

    Args:
        provider: Where completions come from.
        task_description: What the frozen model shall do, in one or two sentences.
        labels: The labels it chooses among.
        examples: Texts of the task with their labels, to show to the LLM. They leave the
            training process, to the provider and into the study's records: none by default.
        mechanism: How a prompt acts on the frozen model, in a sentence from the task model.
        n_validation: How many validation examples the study's values rest on, if known.
        n_stages: How many stages the study shall have in all, if known.
        sections: What the meta-prompt holds, by name: ``mechanism``, ``examples``, ``mistakes``,
            ``signals``, ``directions``, ``ensemble``, ``ranked_prompts``, ``in_flight``,
            ``pools``; ``task`` and ``request`` are always part of it.
        edit_horizon: Stages over which the edit budget of ``pools`` shrinks.
        timeout: Seconds for one proposal: loading the model, all tries and attempts included.
        max_attempts: Attempts at most for one proposal, where replies are of no use.
        max_tries: How often a request is sent at most, where it does not get through.
        backoff: Seconds before a request is repeated; doubled each time, with jitter.
    """

    def __init__(
        self,
        provider: Provider,
        task_description: str = "",
        *,
        labels: Sequence[str] = (),
        examples: Sequence[tuple[str, str]] = (),
        mechanism: str = "",
        n_validation: int | None = None,
        n_stages: int | None = None,
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
        check_at_least(1, n_validation=n_validation, n_stages=n_stages, edit_horizon=edit_horizon)
        check_at_least(1, max_attempts=max_attempts, max_tries=max_tries)
        check_at_least(0, backoff=backoff)
        if not 0 < timeout < float("inf"):
            raise ValueError(f"`timeout` must be a positive number of seconds, got {timeout}.")
        self._provider = provider
        self.options = MetaPromptOptions(
            task_description=task_description,
            labels=tuple(labels),
            examples=tuple(examples),
            mechanism=mechanism,
            n_validation=n_validation,
            n_stages=n_stages,
            sections=tuple(sections),
            edit_horizon=edit_horizon,
        )
        self._timeout = timeout
        self._max_attempts = max_attempts
        self._max_tries = max_tries
        self._backoff = backoff

    @property
    def max_meta_prompt_tokens(self) -> int | None:
        """Tokens that the meta-prompt may have, with room for a word on the last reply."""
        most = self._provider.max_prompt_tokens
        return None if most is None else most - _CORRECTION_TOKENS

    def meta_prompt(self, request: ProposalRequest) -> MetaPrompt:
        """The meta-prompt of a request; a ProposalError if the context is too short for it."""
        return meta_prompt.build(request, self.options, max_tokens=self.max_meta_prompt_tokens)

    def propose(self, request: ProposalRequest) -> Proposal:
        deadline = time.monotonic() + self._timeout
        attempts: list[dict[str, Any]] = []
        details: dict[str, Any] = {"proposer": "llm", "provider": self._provider.name}
        try:
            built = self.meta_prompt(request)
        except ProposalError as error:
            raise ProposalError(str(error), details) from error
        details |= built.facts() | {"meta_prompt": records.clip(built.text), "attempts": attempts}
        judged, problem = reply.JudgedReply(), ""
        too_long: tuple[RestartPrompt, ...] = ()
        while len(attempts) < self._max_attempts and not judged.usable:
            left = deadline - time.monotonic()
            if attempts and left < _MIN_TIMEOUT_S:
                problem += f"; the {self._timeout:g} s for a proposal are over"
                break
            text = built.text + _correction(problem)
            seed = _seed(request, len(attempts))
            try:
                completion_request = _completion_request(request, text, seed, attempts, left)
                judged, row = self._attempt(completion_request, request)
            except Exception as error:  # Providers of third parties raise whatever.
                # A server may have written it: it goes to logs and terminals.
                message = records.clip(one_line(str(error)), _MAX_ERROR)
                attempts.append({"seed": seed, "error": message})
                problem = f"{type(error).__name__}: {message}"
                break
            attempts.append(row)
            problem = judged.problem
            too_long = judged.too_long or too_long
        details["provider"] = self._provider.name  # It may learn the model's name by requests.
        # What is too long is cut to the space's length: better than none, and recorded.
        prompts = judged.usable + judged.too_long or too_long
        if not prompts:
            raise ProposalError(problem, details)
        prompts = prompts[: request.n_candidates]
        if "pools" in built.sections:
            details |= edit_record(request, self.options.edit_horizon, prompts)
        return Proposal(prompts, "llm", details)

    def _attempt(
        self, completion_request: CompletionRequest, request: ProposalRequest
    ) -> tuple[reply.JudgedReply, dict[str, Any]]:
        """One reply, judged, and its row in the record of attempts."""
        started = time.monotonic()
        completion, n_tries = retrying.complete(
            self._provider, completion_request, max_tries=self._max_tries, backoff=self._backoff
        )
        stopped = records.clip(one_line(completion.problem), _MAX_PROBLEM)
        judged = reply.judge(replace(completion, problem=stopped), request)
        facts = records.jsonable(completion.details)
        if len(repr(facts)) > _MAX_DETAILS:  # A server's may be of any size.
            facts = {"details": records.clip(repr(facts), _MAX_DETAILS)}
        return judged, {
            **facts,
            "seed": completion_request.seed,
            "seconds": round(time.monotonic() - started, 3),
            "tries": n_tries,
            "model": records.clip(completion.model, _MAX_PROBLEM),
            "reply": records.clip(completion.text),
            "problem": judged.problem,
            "rejected": [list(pair) for pair in judged.rejected],
            **({"server_problem": stopped} if stopped else {}),
        }


def _seed(request: ProposalRequest, attempt: int) -> int:
    """The proposal's seed for the first attempt; later ones derive theirs from it."""
    derived = np.random.SeedSequence([request.seed, attempt]).generate_state(1)[0]
    return int(derived & 0x7FFFFFFF) if attempt else request.seed


def _completion_request(
    request: ProposalRequest,
    text: str,
    seed: int,
    attempts: Sequence[Mapping[str, Any]],
    timeout: float,
) -> CompletionRequest:
    """The request of the next attempt."""
    n_candidates = request.n_candidates
    # A reply that the server cut may have been thinking: then its own limit alone holds.
    was_cut = any("server_problem" in row for row in attempts)
    most = reply.max_tokens(n_candidates, request.space.num_virtual_tokens)
    return CompletionRequest(
        prompt=text,
        schema=reply.schema(n_candidates, reply.pattern(request.space)),
        seed=seed,
        trial_number=request.trial_number,
        proposal_index=len(request.history.proposals),
        attempt=len(attempts),
        timeout=timeout,
        max_tokens=None if was_cut else most,
    )


def _correction(problem: str) -> str:
    """What is added to the meta-prompt after a reply that was of no use."""
    told = problem[:_MAX_PROBLEM]
    while estimated_tokens(_CORRECTION.format(told)) > _CORRECTION_TOKENS:
        told = told[:-20]
    return _CORRECTION.format(told) if told else ""


def edit_record(
    request: ProposalRequest, horizon: int, prompts: Sequence[RestartPrompt]
) -> dict[str, Any]:
    """How far candidates are from the best prompt, and which go over the budget, for the record.

    The budget is a request to the LLM, not a filter: what goes beyond it is tried as well.
    """
    stages, space = request.history.stages, request.space
    if not stages:
        return {}
    limit = edit_budget(request, horizon)
    best = space.without_padding(stages[0].prompt).split()
    edits = [n_edits(best, space.without_padding(prompt).split()) for prompt in prompts]
    over = [i for i, n in enumerate(edits[:N_REFINED]) if n > limit]
    return {"edit_budget": limit, "edits": edits, "over_budget": over}


def n_edits(old: Sequence[str], new: Sequence[str]) -> int:
    """Words to insert, delete or replace to come from one text to another (Levenshtein)."""
    row = list(range(len(new) + 1))
    for i, word in enumerate(old, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(new, start=1):
            replaced = diagonal + (word != other)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]
