"""Where a stage starts: what is asked of whom, and what becomes of the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace
import math
import time
from typing import Any
from typing import TYPE_CHECKING
import zlib

import numpy as np
import optuna

from optuna_llm_catalyst import background
from optuna_llm_catalyst import breaker
from optuna_llm_catalyst import history
from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import MutationProposer
from optuna_llm_catalyst.proposers import Proposal
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers import Proposer
from optuna_llm_catalyst.proposers.mutation import random_prompt


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

Screen = Callable[[Sequence[RestartPrompt]], Sequence[float]]

#: A startup prompt gets a second chance after a crash, not a third.
_MAX_FAILURES = 2
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True)
class Answer:
    """What a proposer answered to a request.

    Attributes:
        proposal: Its proposal; without prompts if it failed.
        failure: Why it failed, None if it did not.
        seconds: How long it took.
        seen: Which history it was asked with.
    """

    proposal: Proposal
    failure: str | None
    seconds: float
    seen: dict[str, Any]


@dataclass(frozen=True)
class Prefetched:
    """An answer that is under way, of a request made while another stage trains."""

    study_name: str
    answer: Future[Answer]


class RestartPlanner:
    """Chooses restart prompts. Holds configuration only, but for requests in flight.

    The arguments are those of :class:`~optuna_llm_catalyst.LLMCatalystSampler`.
    """

    def __init__(
        self,
        space: PromptSpace,
        proposer: Proposer,
        *,
        n_startup_trials: int,
        startup_prompts: Sequence[RestartPrompt],
        n_candidates: int,
        top_k: int,
        screen: Screen | None,
        seed: int | None,
        prefetch: bool,
    ) -> None:
        self._space = space
        self._proposer = proposer
        self._n_startup_trials = n_startup_trials
        self._startup_prompts = tuple(startup_prompts)
        self._n_candidates = n_candidates
        self._top_k = top_k
        self._screen = screen
        self._seed = seed
        self._prefetch = prefetch
        self._prefetched: deque[Prefetched] = deque()

    def __getstate__(self) -> dict[str, Any]:
        # A request in flight belongs to this process.
        return {**self.__dict__, "_prefetched": deque()}

    def restart_prompt(self, study: optuna.Study, trial: FrozenTrial) -> RestartPrompt:
        """Chooses the restart prompt of a trial and publishes it on the trial."""
        # A trial that is run again after a crash (optuna's retry callbacks) has its answer.
        known = records.load(trial, "proposal")
        if known is not None:
            return self._space.from_token_ids(known["token_ids"])
        past = self._read(study, exclude=trial.number)
        if past.n_finished < self._n_startup_trials:
            ranked, record = self._startup(past, trial)
        else:
            ranked, record = self._propose(study, past, trial)
        for prompt in ranked:
            record |= {"token_ids": list(prompt.token_ids), "text": prompt.text}
            records.save_proposal(study, trial, record)
            # Another worker may have published the same prompt since the history was read. As
            # everyone publishes first and looks then, at least one of the two sees it and yields.
            flying = history.running(study, self._space, exclude=trial.number)
            if prompt.token_ids not in flying:
                break
        records.set_user_attr(study, trial, "origin", record["origin"])
        if self._prefetch:
            self._request_next(study, trial)
        return prompt

    def _request(self, past: history.History, number: int, purpose: str) -> ProposalRequest:
        """What the proposer is asked for a trial of that number."""
        seed = seed_sequence(self._seed, number, purpose).generate_state(1)[0] & 0x7FFFFFFF
        return ProposalRequest(self._space, past, self._n_candidates, int(seed), number)

    def _read(self, study: optuna.Study, *, exclude: int | None = None) -> history.History:
        return history.from_study(study, self._space, top_k=self._top_k, exclude=exclude)

    def _startup(
        self, past: history.History, trial: FrozenTrial
    ) -> tuple[list[RestartPrompt], dict[str, Any]]:
        """Prompts to start from, the preferred one first."""
        rng = np.random.default_rng(seed_sequence(self._seed, trial.number, "startup"))
        untried = [
            prompt
            for prompt in self._startup_prompts
            if prompt.token_ids not in past.tried
            and past.failures.get(prompt.token_ids, 0) < _MAX_FAILURES
        ]
        return [*untried, random_prompt(self._space, rng)], {"origin": "startup"}

    def _propose(
        self, study: optuna.Study, past: history.History, trial: FrozenTrial
    ) -> tuple[list[RestartPrompt], dict[str, Any]]:
        """Prompts to restart from, the preferred one first."""
        request = self._request(past, trial.number, "propose")
        record: dict[str, Any] = {"failure": None}
        if isinstance(self._proposer, MutationProposer):
            proposal = self._proposer.propose(request)
        elif breaker.is_open(past.proposals, trial.number):
            proposal = MutationProposer().propose(request)
            record["breaker"] = "open"
        else:
            proposal, record = self._ask(study, trial, request)
        # In a tiny vocabulary every prompt near the best may have been tried.
        spare = random_prompt(self._space, np.random.default_rng(request.seed))
        prompts = proposal.prompts or (spare,)
        scores = self._scores(prompts)
        order = sorted(range(len(prompts)), key=lambda i: _rank(scores[i], past))
        _logger.info(
            f"Trial {trial.number} restarts from {prompts[order[0]].text!r} ({proposal.origin})."
        )
        return [*(prompts[i] for i in order), spare], {
            **records.jsonable(proposal.details),  # First: they come from someone else's code.
            **record,
            "origin": proposal.origin,
            "candidates": _candidate_records(prompts, scores),
        }

    def _ask(
        self, study: optuna.Study, trial: FrozenTrial, request: ProposalRequest
    ) -> tuple[Proposal, dict[str, Any]]:
        """The proposer's proposal, or a mutation; and what the trial's record says of it."""
        records.mark_proposal_started(study, trial)
        started = time.perf_counter()
        prefetched = self._take_prefetched(study)
        answer = prefetched.result() if prefetched else self._answer(request)
        record: dict[str, Any] = {
            "failure": answer.failure,
            "history_seen": answer.seen,
            "waited_seconds": round(time.perf_counter() - started, 3),
        }
        _count(study, trial, answer)
        # A proposer may take its time, in which other workers went on.
        request = replace(request, history=self._read(study, exclude=trial.number))
        fresh = _fresh(answer.proposal.prompts, request)
        if answer.failure is None and not fresh:
            n_tried = len(answer.proposal.prompts)
            record["failure"] = f"all {n_tried} candidates were tried before"
        failed = record["failure"] is not None
        records.mark_proposal_ended(study, trial, succeeded=not failed)
        record["breaker"] = breaker.transition(request.history.proposals, failed=failed)
        _warn(trial.number, record["failure"], record["breaker"])
        if fresh:
            return replace(answer.proposal, prompts=fresh), record
        mutated = MutationProposer().propose(request).prompts
        return Proposal(mutated, "mutation", answer.proposal.details), record

    def _answer(self, request: ProposalRequest) -> Answer:
        """Asks the proposer; whatever it raises is a failure. Touches no storage."""
        started = time.perf_counter()
        failure = None
        try:
            proposal = _checked(self._proposer.propose(request), request.space)
        except ProposalError as error:
            details = error.details if isinstance(error.details, Mapping) else {}
            proposal, failure = Proposal((), "", details), str(error)
        except Exception as error:  # A study must outlive whatever a third-party proposer raises.
            _logger.debug("The proposer raised.", exc_info=True)
            details = {"proposer": type(self._proposer).__name__}
            proposal, failure = Proposal((), "", details), f"{type(error).__name__}: {error}"
        seen = {
            "trial": request.trial_number,
            "n_finished": request.history.n_finished,
            "n_in_flight": len(request.history.in_flight),
        }
        return Answer(proposal, failure, time.perf_counter() - started, seen)

    def _request_next(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Asks for the next restart while this one's stage trains, from the history up to now."""
        if isinstance(self._proposer, MutationProposer) or self._prefetched:
            return
        past = self._read(study)
        number = trial.number + 1
        is_startup = past.n_finished + len(past.in_flight) < self._n_startup_trials
        if is_startup or breaker.is_open(past.proposals, number):
            return
        request = self._request(past, number, "prefetch")
        answer = background.start(lambda: self._answer(request))
        self._prefetched.append(Prefetched(study.study_name, answer))

    def _take_prefetched(self, study: optuna.Study) -> Future[Answer] | None:
        while self._prefetched:
            # With `n_jobs` another thread may be faster.
            with suppress(IndexError):
                taken = self._prefetched.popleft()
                if taken.study_name == study.study_name:
                    return taken.answer
        return None

    def _scores(self, prompts: Sequence[RestartPrompt]) -> list[float | None]:
        if self._screen is None:
            return [None] * len(prompts)
        scores = [float(score) for score in self._screen(prompts)]
        if len(scores) != len(prompts):
            raise ValueError(
                f"`screen` must return one value a candidate: got {len(scores)} for "
                f"{len(prompts)}."
            )
        return [score if math.isfinite(score) else None for score in scores]


def seed_sequence(seed: int | None, trial_number: int, purpose: str) -> np.random.SeedSequence:
    """The seeds of one trial for one purpose; with ``seed`` None fresh ones each time."""
    if seed is None:
        return np.random.SeedSequence()
    return np.random.SeedSequence([seed, trial_number, zlib.crc32(purpose.encode())])


def _warn(trial_number: int, failure: str | None, transition: str) -> None:
    """One warning a failure until the breaker opens, one when it does and one when it closes."""
    if failure and transition != "still open":
        _logger.warning(f"Trial {trial_number} restarts from a mutation: {failure}.")
    if transition == "opened":
        _logger.warning(
            f"The proposer failed {breaker.THRESHOLD} times in a row: restarts come from "
            "mutation, and it is asked now and then only."
        )
    if transition == "closed":
        _logger.warning(f"Trial {trial_number}: the proposer answers again.")


def _count(study: optuna.Study, trial: FrozenTrial, answer: Answer) -> None:
    """What an LLM cost, as numbers that the dashboard shows."""
    details = answer.proposal.details
    if details.get("proposer") != "llm":
        return
    records.set_user_attr(study, trial, "llm_seconds", round(answer.seconds, 3))
    counts = [
        ask.get(key)
        for ask in details.get("attempts", ())
        for key in ("prompt_tokens", "reply_tokens")
    ]
    known = [count for count in counts if isinstance(count, int)]
    if known:
        records.set_user_attr(study, trial, "llm_tokens", sum(known))


def _rank(score: float | None, past: history.History) -> float:
    if score is None:
        return math.inf
    return score if past.minimize else -score


def _checked(proposal: Proposal, space: PromptSpace) -> Proposal:
    """The proposal in plain types; raises for prompts of another space."""
    prompts = tuple(
        replace(
            space.from_token_ids(prompt.token_ids),
            n_truncated=prompt.n_truncated,
            n_padding=prompt.n_padding,
        )
        for prompt in proposal.prompts
    )
    return Proposal(prompts, str(proposal.origin), dict(proposal.details))


def _fresh(
    prompts: Sequence[RestartPrompt], request: ProposalRequest
) -> tuple[RestartPrompt, ...]:
    """The prompts that nobody tried or tries, without repetitions."""
    unique: dict[tuple[int, ...], RestartPrompt] = {}
    for prompt in prompts:
        if prompt.token_ids not in request.history.tried:
            unique.setdefault(prompt.token_ids, prompt)
    return tuple(unique.values())


def _candidate_records(
    prompts: Sequence[RestartPrompt], scores: Sequence[float | None]
) -> list[dict[str, Any]]:
    return [
        {
            "text": prompt.text,
            "token_ids": list(prompt.token_ids),
            "n_truncated": prompt.n_truncated,
            "n_padding": prompt.n_padding,
            "score": score,
        }
        for prompt, score in zip(prompts, scores, strict=True)
    ]
