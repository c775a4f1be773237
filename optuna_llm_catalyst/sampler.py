"""The sampler: Optuna's hooks, and when a restart prompt is wanted."""

from __future__ import annotations

from collections.abc import Sequence
import copy
from typing import Any
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.first_starts import FirstStarts
from optuna_llm_catalyst.first_starts import seed_sequence
from optuna_llm_catalyst.planner import RestartPlanner
from optuna_llm_catalyst.planner import Screen
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.proposers import LLMProposer
from optuna_llm_catalyst.proposers import MutationProposer
from optuna_llm_catalyst.proposers import Proposer
from optuna_llm_catalyst.proposers.templates import fill
from optuna_llm_catalyst.providers import Provider


#: Without an LLM: starts that differ are what an ensemble of stages gains by.
_N_STARTUP_TRIALS = 8


class LLMCatalystSampler(BaseSampler):
    """Lets an LLM choose where each stage of prompt tuning starts again.

    Each trial is one stage of gradient descent (arXiv 2405.19732). The sampler reads the study's
    history, requests candidates of a proposer, drops those already tried, screens the rest and
    starts from the best. It holds configuration only: everything it learns is in the study.
    When the LLM fails in any way, the candidates are templates that name the task, or mutations,
    and the trial's record says why; the study goes on.

    Args:
        space: The space of prompts. Without one the sampler only passes parameters on to
            ``independent_sampler``.
        llm: The LLM that proposes. Without one, and without ``proposer``, prompts are mutated.
        task_description: What the frozen model shall do, in a sentence. The LLM is told, and
            templates are filled with its words. Default: that of an ``LLMProposer``.
        labels: The names of the labels, for the same uses. Default: those of an ``LLMProposer``.
        proposer: A proposer of your own in place of ``llm``.
        startup: What stages start from where there is no proposal: ``task`` for templates that
            name the task, such as "this question is about", or random words where nothing is
            known of it; ``random`` for random words.
        n_startup_trials: Stages before the first proposal or mutation, the startup prompts' ones
            included. Default: 0 with an LLM, which proposes from the task alone then, else 8.
        startup_prompts: Texts of the first stages. All of them are tried, in their order.
        n_candidates: How many prompts are requested of the proposer.
        top_k: How many prompts of the history it is shown.
        screen: A function from candidates and the study to values without training, in the units
            and direction of the study, such as ``PromptTuningObjective.score``. Without one the
            proposer's first candidate is taken.
        independent_sampler: Samples every parameter that is not the prompt, jointly if it can.
            Default: :class:`optuna.samplers.TPESampler`, seeded per trial.
        prefetch: Request the next restart while a stage trains, so that the LLM's time costs
            none. The LLM then does not see how the stage that is training ends. Off, results do
            not depend on timing.
        ignore_failures_before: A proposer that keeps failing is left alone for some trials.
            Failures in trials below this number do not count: pass the number of the study's
            trials when the LLM has just been reached.
        seed: Seed of everything random, combined with the trial's number. ``None`` for no seed.

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
        labels: Sequence[str] = (),
        proposer: Proposer | None = None,
        startup: Literal["task", "random"] = "task",
        n_startup_trials: int | None = None,
        startup_prompts: Sequence[str] = (),
        n_candidates: int = 4,
        top_k: int = 10,
        screen: Screen | None = None,
        independent_sampler: BaseSampler | None = None,
        prefetch: bool = False,
        ignore_failures_before: int = 0,
        seed: int | None = None,
    ) -> None:
        if llm is not None and proposer is not None:
            raise ValueError("Give `llm` or `proposer`, not both.")
        for name, texts in (("startup_prompts", startup_prompts), ("labels", labels)):
            if isinstance(texts, str):
                raise ValueError(f"`{name}` must be a list of texts, got a single text.")
        if startup not in ("task", "random"):
            raise ValueError(f"`startup` must be 'task' or 'random', got {startup!r}.")
        check_at_least(1, n_candidates=n_candidates, top_k=top_k)
        check_at_least(0, n_startup_trials=n_startup_trials, seed=seed)
        check_at_least(0, ignore_failures_before=ignore_failures_before)
        if proposer is None:
            told = LLMProposer(llm, task_description, labels=labels) if llm else None
            proposer = told or MutationProposer()
        if n_startup_trials is None:
            mutates = isinstance(proposer, MutationProposer)
            n_startup_trials = _N_STARTUP_TRIALS if mutates else 0
        if isinstance(proposer, LLMProposer):
            task_description = task_description or proposer.options.task_description
            labels = labels or proposer.options.labels
        self._planner: RestartPlanner | None = None
        self._prompt_params: dict[str, BaseDistribution] = {}
        if space is not None:
            self._prompt_params.update(space.search_space)
            self._planner = RestartPlanner(
                space=space,
                proposer=proposer,
                first=FirstStarts(
                    space,
                    [space.from_text(text, warn=True) for text in startup_prompts],
                    fill(space, task_description, labels) if startup == "task" else (),
                    n_startup_trials,
                    seed,
                ),
                n_candidates=n_candidates,
                top_k=top_k,
                screen=screen,
                seed=seed,
                ignore_failures_before=ignore_failures_before,
                prefetch=prefetch,
            )
        self._independent_sampler = independent_sampler
        self._seed = seed

    def __getstate__(self) -> dict[str, Any]:
        # A shallow copy, too, has a planner of its own, without proposals under way.
        return {**self.__dict__, "_planner": copy.copy(self._planner)}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        rest: dict[str, BaseDistribution] = {}
        # The default sampler needs parameters that all trials share: one trial without any
        # beside the prompt spares the walk through the whole study.
        if self._independent_sampler is not None or self._has_other_params(study, trial):
            rest = self._inner(trial).infer_relative_search_space(study, trial)
        return {**rest, **self._prompt_params}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        rest = {name: d for name, d in search_space.items() if name not in self._prompt_params}
        params: dict[str, Any] = {}
        if rest:
            params = dict(self._inner(trial).sample_relative(study, trial, rest))
            for name, distribution in rest.items():
                if name not in params:
                    params[name] = self.sample_independent(study, trial, name, distribution)
        if self._planner is not None:
            space = self._planner.space
            given = {**records.fixed_by_sampler(study), **records.enqueued_params(trial)}
            fixed = space.fixed_ids(trial.number, given)
            free = [name for i, name in enumerate(space.param_names) if i not in fixed]
            # A prompt of which every token is fixed is there already.
            if free and search_space.keys() >= set(free):
                prompt = space.to_params(self._planner.restart_prompt(study, trial, fixed))
                params.update({name: prompt[name] for name in free})
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
        seeds = seed_sequence(self._seed, trial.number, purpose or "relative").generate_state(1)
        return TPESampler(seed=int(seeds[0]))

    def _has_other_params(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        for other in reversed(records.all_trials(study)):
            if other.state in records.FINISHED and other.number != trial.number:
                return bool(other.params.keys() - self._prompt_params.keys())
        return False
