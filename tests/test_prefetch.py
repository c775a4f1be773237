from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import breaker
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import records
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from tests.toy_stage import reply
from tests.toy_stage import texts
from tests.toy_stage import told
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space


SPACE = word_space(3)
PROMPTS = texts(20)


class Slow:
    """A provider that answers when it is let, and tells when it was asked."""

    name = "slow:test"
    max_prompt_tokens = None

    def __init__(self, *, fails: bool = False) -> None:
        self.asked: list[CompletionRequest] = []
        self.go = threading.Event()
        self.go.set()
        self._fails = fails

    def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        assert self.go.wait(timeout=30)
        if self._fails:
            raise ProviderError("the line is dead")
        return Completion(reply(PROMPTS[len(self.asked) + 1]), "slow")


def sampler_of(provider: Any, **arguments: Any) -> LLMCatalystSampler:
    proposer = LLMProposer(provider, backoff=0)
    startup = {"startup_prompts": PROMPTS[:2], "seed": 0, "prefetch": True}
    return LLMCatalystSampler(SPACE, proposer=proposer, **{**startup, **arguments})


def until(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def proposal(trial: Any) -> dict[str, Any]:
    return records.load(trial, "proposal") or {}


def test_the_next_restart_is_asked_for_while_a_stage_trains() -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider))
    stage = ToyObjective(SPACE)
    n_asked: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        SPACE.suggest(trial)
        # This stage is the second of two first ones, or a later one: the next will propose.
        until(lambda: len(provider.asked) == max(0, trial.number))
        n_asked.append(len(provider.asked))
        return stage(trial)

    study.optimize(objective, n_trials=5)
    assert n_asked == [0, 1, 2, 3, 4]
    assert [trial.user_attrs["origin"] for trial in study.trials] == ["startup"] * 2 + ["llm"] * 3
    # What was asked during stage 1, when only stage 0 had finished, is the restart of stage 2.
    for trial, asked in zip(study.trials[2:], provider.asked, strict=False):
        seen = proposal(trial)["history_seen"]
        assert seen == {"trial": trial.number, "n_finished": trial.number - 1, "n_in_flight": 1}
        assert proposal(trial)["meta_prompt"] == asked.prompt
        assert (
            f'"{study.trials[trial.number - 1].user_attrs["prompt"]}"'
            in (asked.prompt.partition("right now")[2])
        )


def test_without_prefetch_nothing_is_asked_ahead_and_timing_changes_nothing() -> None:
    studies = []
    for _ in range(2):
        provider = Slow()
        study = optuna.create_study(sampler=sampler_of(provider, prefetch=False))
        study.optimize(ToyObjective(SPACE), n_trials=5)
        assert len(provider.asked) == 3
        assert [proposal(t)["history_seen"]["n_finished"] for t in study.trials[2:]] == [2, 3, 4]
        studies.append(told(study))
    assert studies[0] == studies[1]


def test_copies_and_pickles_drop_the_request_in_flight() -> None:
    sampler = sampler_of(Picklable(), startup_prompts=PROMPTS[:1])
    study = optuna.create_study(sampler=sampler)
    study.optimize(ToyObjective(SPACE), n_trials=1)
    assert n_in_flight(sampler) == 1
    for twin in (copy.deepcopy(sampler), copy.copy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert n_in_flight(twin) == 0
    assert n_in_flight(sampler) == 1


def n_in_flight(sampler: LLMCatalystSampler) -> int:
    assert sampler._planner is not None
    return len(sampler._planner._prefetched)


class Picklable:
    """A provider without threads and locks."""

    name = "reply:test"
    max_prompt_tokens = None

    def complete(self, request: CompletionRequest) -> Completion:
        return Completion(reply(PROMPTS[5]), "reply")


def test_a_request_of_one_study_is_not_answered_in_another() -> None:
    provider = Slow()
    sampler = sampler_of(provider, startup_prompts=PROMPTS[:1])
    first, second = (optuna.create_study(sampler=sampler) for _ in range(2))
    first.optimize(ToyObjective(SPACE), n_trials=1)
    until(lambda: len(provider.asked) == 1)
    second.optimize(ToyObjective(SPACE), n_trials=2)
    assert len(provider.asked) >= 2
    assert proposal(second.trials[1])["meta_prompt"] != provider.asked[0].prompt


def test_a_prefetched_failure_is_a_failure_of_the_trial_that_needed_it() -> None:
    provider = Slow(fails=True)
    study = optuna.create_study(sampler=sampler_of(provider))
    study.optimize(ToyObjective(SPACE), n_trials=12)
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    assert origins == ["startup"] * 2 + ["mutation"] * 10
    assert proposal(study.trials[2])["failure"] == "ProviderError: the line is dead"
    states = [proposal(trial).get("breaker") for trial in study.trials[2:]]
    # Three failures, two trials without asking, a probe, four without.
    assert states == ["", "", "opened", "open", "open", "still open", *["open"] * 4]
    assert len(provider.asked) <= 4 + breaker.THRESHOLD


def test_a_study_of_several_threads_prefetches_distinct_prompts() -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider))
    study.optimize(ToyObjective(SPACE), n_trials=12, n_jobs=3)
    tried = [trial.user_attrs["prompt"] for trial in study.trials]
    assert len(set(tried)) == 12


@pytest.mark.parametrize("n_trials", [1, 2])
def test_nothing_is_asked_ahead_for_a_first_stage(n_trials: int) -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=PROMPTS[:3]))
    study.optimize(ToyObjective(SPACE), n_trials=n_trials)
    assert provider.asked == []
