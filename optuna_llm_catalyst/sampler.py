"""Optuna's sampler hooks: when a restart prompt is wanted, and what becomes of an answer."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
import math
import time
from typing import Any
from typing import TYPE_CHECKING
import zlib

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from optuna_llm_catalyst import history
from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import LLMProposer
from optuna_llm_catalyst.proposers import MutationProposer
from optuna_llm_catalyst.proposers import Proposal
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers import Proposer
from optuna_llm_catalyst.proposers.mutation import random_prompt


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from optuna_llm_catalyst.providers import Provider

Screen = Callable[[Sequence[RestartPrompt]], Sequence[float]]

_DEFAULT_N_STARTUP_TRIALS = 3
#: A startup prompt gets a second chance after a crash, not a third.
_MAX_FAILURES = 2
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class LLMCatalystSampler(BaseSampler):
    """Lets an LLM choose where each stage of prompt tuning starts again.

    Each trial is one stage of gradient descent (arXiv 2405.19732). The sampler reads the study's
    history, asks a proposer for candidates, drops those already tried, screens the rest and
    starts from the best. It holds configuration only: everything it learns is in the study.

    When the LLM fails in any way, the candidates come from mutation and the trial's record says
    why; the study goes on.

    Args:
        space:
            The space of prompts. Without one the sampler only passes parameters on to
            ``independent_sampler``.
        llm:
            The LLM that proposes. Without one, and without ``proposer``, prompts are mutated.
        task_description:
            What the frozen model shall do, in a sentence; part of what the LLM is told.
        proposer:
            A proposer of your own in place of ``llm`` and ``task_description``.
        n_startup_trials:
            Stages that start from ``startup_prompts`` or random words before the proposer is
            asked. Default: as many as there are startup prompts, or 3.
        startup_prompts:
            Texts of the first stages. Those beyond their number start from random whole words.
        n_candidates:
            How many prompts the proposer is asked for.
        top_k:
            How many prompts of the history it is shown.
        screen:
            A function from candidates to values without training, in the units and direction of
            the study, such as ``PromptTuningObjective.score``. Without one the proposer's first
            candidate is taken.
        independent_sampler:
            Samples every parameter that is not the prompt, jointly if it can.
            Default: :class:`optuna.samplers.TPESampler`, seeded per trial.
        seed:
            Seed of everything random, combined with the trial's number. ``None`` for no seed.

    Example:

        .. code-block:: python

            space = PromptSpace(tokenizer, num_virtual_tokens=8)
            sampler = LLMCatalystSampler(space, llm=OllamaProvider("gemma3:4b"), seed=0)
            study = optuna.create_study(sampler=sampler)
            trial = study.ask()
            prompt = space.suggest(trial)
    """

    def __init__(
        self,
        space: PromptSpace | None = None,
        llm: Provider | None = None,
        *,
        task_description: str = "",
        proposer: Proposer | None = None,
        n_startup_trials: int | None = None,
        startup_prompts: Sequence[str] = (),
        n_candidates: int = 4,
        top_k: int = 10,
        screen: Screen | None = None,
        independent_sampler: BaseSampler | None = None,
        seed: int | None = None,
    ) -> None:
        if llm is not None and proposer is not None:
            raise ValueError("Give `llm` or `proposer`, not both.")
        if isinstance(startup_prompts, str):
            raise ValueError("`startup_prompts` must be a list of texts, got a single text.")
        if n_startup_trials is None:
            n_startup_trials = len(startup_prompts) or _DEFAULT_N_STARTUP_TRIALS
        for name, value, least in (
            ("n_startup_trials", n_startup_trials, max(1, len(startup_prompts))),
            ("n_candidates", n_candidates, 1),
            ("top_k", top_k, 1),
            ("seed", 0 if seed is None else seed, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self._space = space
        self._mutation = MutationProposer()
        if proposer is None:
            proposer = LLMProposer(llm, task_description) if llm is not None else self._mutation
        self._proposer = proposer
        self._n_startup_trials = n_startup_trials
        self._startup_prompts = tuple(
            space.from_text(text) for text in startup_prompts if space is not None
        )
        self._n_candidates = n_candidates
        self._top_k = top_k
        self._screen = screen
        self._independent_sampler = independent_sampler
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        prompt_space: dict[str, BaseDistribution] = {}
        if self._space is not None:
            prompt_space.update(self._space.search_space)
        rest: dict[str, BaseDistribution] = {}
        # The default sampler needs parameters that all trials share: one trial without any
        # beside the prompt spares the walk through the whole study.
        if self._independent_sampler is not None or self._has_other_params(study, trial):
            sampler = self._inner(trial)
            rest = sampler.infer_relative_search_space(study, trial)
        return {**rest, **prompt_space}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        prompt_names = set(self._space.param_names) if self._space is not None else set()
        rest = {name: d for name, d in search_space.items() if name not in prompt_names}
        params: dict[str, Any] = {}
        if rest:
            params.update(self._inner(trial).sample_relative(study, trial, rest))
            for name, distribution in rest.items():
                if name not in params:
                    params[name] = self.sample_independent(study, trial, name, distribution)
        # A prompt that was enqueued is there already, whatever else of its trial is sampled.
        enqueued = prompt_names <= trial.system_attrs.get("fixed_params", {}).keys()
        if self._space is not None and prompt_names <= search_space.keys() and not enqueued:
            prompt = self._restart_prompt(study, trial, self._space)
            params.update(self._space.to_params(prompt))
        return params

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        sampler = self._inner(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self._independent_sampler is not None:
            self._independent_sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        if self._independent_sampler is not None:
            self._independent_sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def _inner(self, trial: FrozenTrial, purpose: str = "") -> BaseSampler:
        """The sampler of all other parameters.

        The default one is made afresh for each use: it then depends on the seed, the trial and
        the parameter only, and a study that is resumed goes on as if it had not stopped.
        """
        if self._independent_sampler is not None:
            return self._independent_sampler
        seeds = self._seed_sequence(trial, purpose or "relative").generate_state(1)
        return TPESampler(seed=int(seeds[0]))

    def _seed_sequence(self, trial: FrozenTrial, purpose: str) -> np.random.SeedSequence:
        if self._seed is None:
            return np.random.SeedSequence()
        return np.random.SeedSequence([self._seed, trial.number, zlib.crc32(purpose.encode())])

    def _has_other_params(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        names = set(self._space.param_names) if self._space is not None else set()
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        for other in reversed(records.all_trials(study)):
            if other.state in finished and other.number != trial.number:
                return bool(other.params.keys() - names)
        return False

    def _restart_prompt(
        self, study: optuna.Study, trial: FrozenTrial, space: PromptSpace
    ) -> RestartPrompt:
        # A trial that is run again after a crash (optuna's retry callbacks) has its answer.
        known = records.load(trial, "proposal")
        if known is not None:
            return space.from_token_ids(known["token_ids"])
        past = self._read(study, trial, space)
        if past.n_finished < self._n_startup_trials:
            ranked, record = self._startup(past, trial, space)
        else:
            ranked, record = self._propose(study, past, trial, space)
        for prompt in ranked:
            record |= {"token_ids": list(prompt.token_ids), "text": prompt.text}
            records.save_proposal(study, trial, record)
            # Another worker may have published the same prompt since the history was read. As
            # everyone publishes first and looks then, at least one of the two sees it and yields.
            if prompt.token_ids not in history.running(study, space, exclude=trial.number):
                break
        records.set_user_attr(study, trial, "origin", record["origin"])
        return prompt

    def _read(
        self, study: optuna.Study, trial: FrozenTrial, space: PromptSpace
    ) -> history.History:
        return history.from_study(study, space, top_k=self._top_k, exclude=trial.number)

    def _startup(
        self, past: history.History, trial: FrozenTrial, space: PromptSpace
    ) -> tuple[list[RestartPrompt], dict[str, Any]]:
        """Prompts to start from, the preferred one first."""
        rng = np.random.default_rng(self._seed_sequence(trial, "startup"))
        untried = [
            prompt
            for prompt in self._startup_prompts
            if prompt.token_ids not in past.tried
            and past.failures.get(prompt.token_ids, 0) < _MAX_FAILURES
        ]
        return [*untried, random_prompt(space, rng)], {"origin": "startup"}

    def _propose(
        self, study: optuna.Study, past: history.History, trial: FrozenTrial, space: PromptSpace
    ) -> tuple[list[RestartPrompt], dict[str, Any]]:
        """Prompts to restart from, the preferred one first."""
        seed = int(self._seed_sequence(trial, "propose").generate_state(1)[0]) & 0x7FFFFFFF
        request = ProposalRequest(space, past, self._n_candidates, seed, trial.number)
        started = time.perf_counter()
        proposal, failure = self._ask(request)
        if proposal.origin == "llm":
            seconds = time.perf_counter() - started
            records.set_user_attr(study, trial, "llm_seconds", round(seconds, 3))
            self._count_tokens(study, trial, proposal)
            # An LLM takes its time, in which other workers went on.
            request = replace(request, history=self._read(study, trial, space))
        fresh = _fresh(proposal.prompts, request)
        if failure is None and not fresh:
            failure = f"all {len(proposal.prompts)} candidates were tried before"
        proposal = replace(proposal, prompts=fresh)
        if failure is not None:
            _logger.warning(f"Trial {trial.number} restarts from a mutation: {failure}.")
            mutated = self._mutation.propose(request).prompts
            proposal = Proposal(mutated, "mutation", proposal.details)
        # In a tiny vocabulary every prompt near the best may have been tried.
        spare = random_prompt(space, np.random.default_rng(seed))
        prompts = proposal.prompts or (spare,)
        scores = self._scores(prompts)
        order = sorted(range(len(prompts)), key=lambda i: self._rank(scores[i], past))
        _logger.info(
            f"Trial {trial.number} restarts from {prompts[order[0]].text!r} ({proposal.origin})."
        )
        return [*(prompts[i] for i in order), spare], {
            **records.jsonable(proposal.details),  # First: they come from someone else's code.
            "origin": proposal.origin,
            "failure": failure,
            "candidates": _candidate_records(prompts, scores),
        }

    def _ask(self, request: ProposalRequest) -> tuple[Proposal, str | None]:
        """The proposer's answer; or an empty one, and the reason."""
        try:
            proposal = self._proposer.propose(request)
            for prompt in proposal.prompts:
                request.space.from_token_ids(prompt.token_ids)  # Raises for one of another space.
        except ProposalError as error:
            return Proposal((), "llm", error.details), str(error)
        except Exception as error:  # A study must outlive whatever a third-party provider raises.
            _logger.debug("The proposer raised.", exc_info=True)
            return Proposal((), "llm"), f"{type(error).__name__}: {error}"
        return proposal, None

    def _count_tokens(self, study: optuna.Study, trial: FrozenTrial, proposal: Proposal) -> None:
        counts = [proposal.details.get(key) for key in ("prompt_tokens", "reply_tokens")]
        known = [count for count in counts if isinstance(count, int)]
        if known:
            records.set_user_attr(study, trial, "llm_tokens", sum(known))

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

    def _rank(self, score: float | None, past: history.History) -> float:
        if score is None:
            return math.inf
        return score if past.minimize else -score


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
