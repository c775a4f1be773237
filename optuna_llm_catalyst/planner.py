"""Where a stage starts: who proposes it, and which of the candidates is taken."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import math
import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from optuna_llm_catalyst import breaker
from optuna_llm_catalyst import history
from optuna_llm_catalyst import prefetch
from optuna_llm_catalyst import records
from optuna_llm_catalyst.first_starts import FirstStarts
from optuna_llm_catalyst.first_starts import seed_sequence
from optuna_llm_catalyst.first_starts import Start
from optuna_llm_catalyst.prefetch import UnderWay
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import MutationProposer
from optuna_llm_catalyst.proposers import Proposal
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers import Proposer
from optuna_llm_catalyst.proposers.base import proposal_of
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError


#: Candidates to values without training. The study is for scores that depend on its stages.
Screen = Callable[[Sequence[RestartPrompt], optuna.Study], Sequence[float]]
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(eq=False)
class RestartPlanner:
    """Chooses restart prompts. Its fields follow from arguments of the sampler."""

    space: PromptSpace
    proposer: Proposer
    first: FirstStarts
    n_candidates: int
    top_k: int
    screen: Screen | None
    seed: int | None
    ignore_failures_before: int
    prefetch: bool
    #: All that a sampler holds beyond its configuration.
    under_way: UnderWay = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # The thread that makes a proposal is in one process: a copy and a pickle have none.
        return {**self.__dict__, "under_way": {}}

    def restart_prompt(
        self, study: optuna.Study, trial: FrozenTrial, fixed: Mapping[int, int]
    ) -> RestartPrompt:
        """Chooses the restart prompt of a trial, with the fixed tokens, and publishes it on it."""
        # A trial that is run again after a crash (optuna's retry callbacks) has its prompt.
        known = self._published(trial, fixed)
        if known is not None:
            return known
        past = self._read(study, exclude=trial.number)
        record: dict[str, Any] = {}
        ranked = self.first.due(past, trial.number, fixed, n_known=past.n_finished)
        if not ranked:
            ranked, record = self._propose(study, past, trial, fixed)
        prompt = self._publish(study, trial, ranked, record)
        self._request_next(study, trial.number)
        return prompt

    def _published(self, trial: FrozenTrial, fixed: Mapping[int, int]) -> RestartPrompt | None:
        record = records.load(trial, "proposal", records.ProposalRecord)
        if record is None or not self.space.is_prompt(record.token_ids):
            return None
        prompt = self.space.from_token_ids(record.token_ids)
        return prompt if self.space.with_tokens(prompt, fixed) == prompt else None

    def _publish(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        ranked: Sequence[Start],
        record: Mapping[str, Any],
    ) -> RestartPrompt:
        """Publishes the first of the prompts that no other worker tries, else the last."""
        for prompt, origin in ranked:
            records.set_user_attr(study, trial, "origin", origin)
            chosen = {"origin": origin, **self._row(prompt)}
            records.save_proposal(study, trial, {**record, **chosen})
            # Another worker may have published the same prompt since the history was read. As
            # everyone publishes first and looks then, at least one of the two sees it and yields.
            if prompt.token_ids not in history.taken_meanwhile(study, self.space, trial):
                return prompt
        return ranked[-1][0]

    def _row(self, prompt: RestartPrompt) -> dict[str, Any]:
        """A prompt in a record; its text is for people, who need no padding."""
        return {
            "text": self.space.without_padding(prompt),
            "token_ids": prompt.token_ids,
            "n_truncated": prompt.n_truncated,
        }

    def _read(self, study: optuna.Study, *, exclude: int | None = None) -> history.History:
        return history.from_study(study, self.space, top_k=self.top_k, exclude=exclude)

    def _request(
        self, past: history.History, number: int, purpose: str, fixed: Mapping[int, int]
    ) -> ProposalRequest:
        """What is requested of the proposer for a trial of that number."""
        seed = seed_sequence(self.seed, number, purpose).generate_state(1)[0] & 0x7FFFFFFF
        screened = self.screen is not None
        return ProposalRequest(
            self.space, past, self.n_candidates, int(seed), number, fixed, screened
        )

    def _propose(
        self,
        study: optuna.Study,
        past: history.History,
        trial: FrozenTrial,
        fixed: Mapping[int, int],
    ) -> tuple[list[Start], dict[str, Any]]:
        """What to restart from, the preferred start first, and the trial's record."""
        request = self._request(past, trial.number, "propose", fixed)
        record: dict[str, Any] = {"failure": None}
        if isinstance(self.proposer, MutationProposer):
            # Before the first stage has a value there is nothing to mutate.
            mutated = proposal_of(self.proposer, request) if past.points else None
            proposal = _fresh(mutated, past) if mutated else self._other(request)
        elif breaker.is_open(self._counted(past), trial.number):
            record["breaker"] = "open"
            proposal = self._other(request)
        else:
            proposal, record = self._request_proposal(study, trial, request)
        # In a tiny vocabulary every prompt near the best may have been tried.
        spare = self.first.random(trial.number, fixed)
        prompts = proposal.prompts or (spare,)
        scores = self._scores(prompts, study)
        sign = 1.0 if past.minimize else -1.0
        ranks = [math.inf if score is None else sign * score for score in scores]
        ranked = [(prompts[i], proposal.origin) for i in np.argsort(ranks, kind="stable")]
        _logger.info(
            f"Trial {trial.number} restarts from {self.space.without_padding(ranked[0][0])!r} "
            f"({proposal.origin})."
        )
        candidates = [
            {**self._row(prompt), "score": score}
            for prompt, score in zip(prompts, scores, strict=True)
        ]
        # The details come first: they are from someone else's code.
        return [*ranked, (spare, "startup")], {
            **proposal.details,
            **record,
            "candidates": candidates,
        }

    def _request_proposal(
        self, study: optuna.Study, trial: FrozenTrial, request: ProposalRequest
    ) -> tuple[Proposal, dict[str, Any]]:
        """The proposer's proposal, or another one; and what the trial's record says of it."""
        started = time.perf_counter()
        # Before the mark, by which others see that this trial needs no prefetched proposal.
        prefetched = prefetch.take(self.under_way, study, trial, request.fixed)
        records.mark_proposal_started(study, trial)
        proposal = prefetched.result() if prefetched else proposal_of(self.proposer, request)
        waited = round(time.perf_counter() - started, 3)
        _count(study, trial, proposal)
        # A proposer may take its time, in which other workers went on.
        request = replace(request, history=self._read(study, exclude=trial.number))
        fresh = _fresh(proposal, request.history)
        failure = proposal.details["failure"]
        if failure is None and not fresh.prompts:
            failure = f"all {len(proposal.prompts)} candidates were tried before"
        records.mark_proposal_ended(study, trial, succeeded=failure is None)
        change = breaker.transition(self._counted(request.history), failed=failure is not None)
        if failure is not None:
            fresh = replace(self._other(request), details=proposal.details)
        _warn(trial.number, failure, change, fresh.origin)
        return fresh, {"failure": failure, "breaker": change, "waited_seconds": waited}

    def _other(self, request: ProposalRequest) -> Proposal:
        """What takes the place of a proposal: templates, then mutations; words if need be."""
        past, number, fixed = request.history, request.trial_number, request.fixed
        templates = self.first.templates_left(past, number, fixed)[: request.n_candidates]
        if templates:
            return Proposal(tuple(templates), "template", {"proposer": "template"})
        if not past.points:
            return Proposal((self.first.random(number, fixed),), "startup")
        return _fresh(proposal_of(MutationProposer(), request), past)

    def _counted(self, past: history.History) -> Sequence[history.PastProposal]:
        """The past proposals that count for the breaker."""
        first = self.ignore_failures_before
        return [proposal for proposal in past.proposals if proposal.trial_number >= first]

    def _request_next(self, study: optuna.Study, number: int) -> None:
        """Requests the restart of a new trial while trial ``number`` trains."""
        if not self.prefetch or isinstance(self.proposer, MutationProposer):
            return
        fixed = self.space.fixed_ids(number, records.fixed_by_sampler(study))

        def work_of(new: int) -> Callable[[], Proposal] | None:
            past = self._read(study)
            n_known = past.n_finished + len(past.in_flight)
            is_first = self.first.due(past, new, fixed, n_known=n_known)
            if is_first or breaker.is_open(self._counted(past), new):
                return None
            request = self._request(past, new, "prefetch", fixed)
            return lambda: proposal_of(self.proposer, request)

        prefetch.start(self.under_way, study, fixed, work_of)

    def _scores(self, prompts: Sequence[RestartPrompt], study: optuna.Study) -> list[float | None]:
        if self.screen is None:
            return [None] * len(prompts)
        scores = [float(score) for score in self.screen(prompts, study)]
        if len(scores) != len(prompts):
            raise ValueError(
                f"`screen` must return one value a candidate: got {len(scores)} for "
                f"{len(prompts)}."
            )
        return [score if math.isfinite(score) else None for score in scores]


def described(origin: str) -> str:
    """What a stage of an origin starts from, in words."""
    return "random words" if origin == "startup" else f"a {origin}"


def _warn(trial_number: int, failure: str | None, transition: str, origin: str) -> None:
    """One warning a failure until the breaker opens, one when it does and one when it closes."""
    if failure and transition != "still open":
        _logger.warning(f"Trial {trial_number} restarts from {described(origin)}: {failure}.")
    if transition == "opened":
        _logger.warning(
            f"The proposer failed {breaker.THRESHOLD} times in a row: stages start without it, "
            "and it is tried again now and then only."
        )
    if transition == "closed":
        _logger.warning(f"Trial {trial_number}: the proposer works again.")


def _count(study: optuna.Study, trial: FrozenTrial, proposal: Proposal) -> None:
    """What an LLM cost, as numbers that the dashboard shows."""
    details = proposal.details
    if details.get("proposer") != "llm":
        return
    records.set_user_attr(study, trial, "llm_seconds", details["seconds"])
    with suppress(SchemaError):  # The details may be those of somebody else's proposer.
        attempts = decode(list[dict[str, Any]], details.get("attempts", []))
        counts = [row.get(key) for row in attempts for key in ("prompt_tokens", "reply_tokens")]
        known = decode(list[int], [count for count in counts if count is not None])
        if known:
            records.set_user_attr(study, trial, "llm_tokens", sum(known))


def _fresh(proposal: Proposal, past: history.History) -> Proposal:
    """The proposal with the prompts that nobody tried or tries, without repetitions."""
    # Equal prompts have equal token ids: the first of them stays.
    unique = dict.fromkeys(proposal.prompts)
    return replace(proposal, prompts=tuple(p for p in unique if p.token_ids not in past.tried))
