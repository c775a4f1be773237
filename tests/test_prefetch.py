from __future__ import annotations

from collections.abc import Callable
import copy
from itertools import permutations
import os
import pickle
import threading
import time
from typing import Any
from typing import TypeVar

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
from tests.toy_stage import run_python
from tests.toy_stage import texts
from tests.toy_stage import told
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space
from tests.toy_stage import WORDS


T = TypeVar("T")
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
    return records.load(trial, "proposal", dict[str, Any]) or {}


def test_the_next_restart_is_requested_while_a_stage_trains() -> None:
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


def held(work: Callable[[], T]) -> T:
    """Does the work in another thread, and only once this one waits for it."""
    waiting, done = threading.Event(), threading.Event()
    results: list[T] = []

    def late() -> None:
        assert waiting.wait(30)
        results.append(work())
        done.set()

    thread = threading.Thread(target=late)
    thread.start()
    waiting.set()
    assert done.wait(30)
    thread.join()
    return results[0]


@pytest.mark.parametrize("slow_llm", [False, True])
@pytest.mark.parametrize("slow_stage", [False, True])
def test_without_prefetch_timing_changes_nothing(slow_llm: bool, slow_stage: bool) -> None:
    def study_of(llm_is_slow: bool, stage_is_slow: bool) -> optuna.Study:
        provider = Slow()
        complete, stage = provider.complete, ToyObjective(SPACE)
        if llm_is_slow:
            provider.complete = lambda request: held(lambda: complete(request))  # type: ignore[method-assign]
        study = optuna.create_study(sampler=sampler_of(provider, prefetch=False))
        study.optimize(lambda t: held(lambda: stage(t)) if stage_is_slow else stage(t), n_trials=5)
        assert len(provider.asked) == 3
        return study

    quick, slow = study_of(False, False), study_of(slow_llm, slow_stage)
    assert [proposal(t)["history_seen"]["n_finished"] for t in slow.trials[2:]] == [2, 3, 4]
    assert told(slow) == told(quick)


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
    return len(sampler._planner.under_way)


class Picklable:
    """A provider without threads and locks."""

    name = "reply:test"
    max_prompt_tokens = None

    def complete(self, request: CompletionRequest) -> Completion:
        return Completion(reply(PROMPTS[5]), "reply")


def test_studies_of_one_name_in_two_storages_keep_their_proposals() -> None:
    provider = Slow()
    sampler = sampler_of(provider)
    studies = [optuna.create_study(sampler=sampler, study_name="s") for _ in range(2)]
    values = [0.123, 0.987]
    # The second one runs while the proposal for the first waits to be taken.
    for n_trials in (2, 2):
        for study, value in zip(studies, values, strict=True):
            study.optimize(lambda t, v=value: v + 0 * len(SPACE.suggest(t).text), n_trials)
    for study, own, other in zip(studies, values, reversed(values), strict=True):
        for trial in study.trials[2:]:
            meta_prompt = proposal(trial)["meta_prompt"]
            assert f"{own}" in meta_prompt
            assert f"{other}" not in meta_prompt


FORK = """
import os, sys
import optuna
from tests.test_prefetch import PROMPTS, Slow, SPACE, ToyObjective, sampler_of, until

provider = Slow()
study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=PROMPTS[:1]))
provider.go.clear()
study.optimize(ToyObjective(SPACE), n_trials=1)
until(lambda: provider.asked)  # The request is in flight, and its thread is not in the fork.
child = os.fork()
if child == 0:
    provider.go.set()
    study.optimize(ToyObjective(SPACE), n_trials=2)
    print([trial.user_attrs["origin"] for trial in study.trials], flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
provider.go.set()
study.optimize(ToyObjective(SPACE), n_trials=1)
print(len(provider.asked), study.trials[1].user_attrs["prompt"] == PROMPTS[2])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_does_not_wait_for_its_parents_request() -> None:
    lines = run_python(FORK, "-W", "ignore").splitlines()
    assert lines[0] == "['startup', 'llm', 'llm']"
    assert lines[1].endswith("True")  # The parent still takes its own.


def test_a_proposal_is_for_the_tokens_that_are_fixed() -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=PROMPTS[:1]))
    study.optimize(ToyObjective(SPACE), n_trials=1)
    until(lambda: len(provider.asked) == 1)
    study.enqueue_trial({"prompt[1]": 7})
    study.optimize(ToyObjective(SPACE), n_trials=2)
    assert proposal(study.trials[1])["meta_prompt"] != provider.asked[0].prompt
    assert proposal(study.trials[2])["meta_prompt"] == provider.asked[0].prompt


def test_a_prefetched_failure_counts_for_the_trial_that_takes_it() -> None:
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


def test_each_request_of_several_threads_is_for_its_trial() -> None:
    prompts = [" ".join(words) for words in permutations(WORDS[1:8], 3)]
    provider = Slow()
    requests, taken = provider.asked, iter(prompts[2:])

    def complete(request: CompletionRequest) -> Completion:
        requests.append(request)
        time.sleep(0.002)  # The threads change places.
        return Completion(reply(next(taken)), "slow")

    provider.complete = complete  # type: ignore[method-assign]
    study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=prompts[:2]))
    stage = ToyObjective(SPACE)

    def objective(trial: optuna.Trial) -> float:
        value = stage(trial)
        time.sleep(0.001 * (trial.number % 4))
        return value

    study.optimize(objective, n_trials=60, n_jobs=4)
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    for trial in study.trials:
        if origins[trial.number] == "llm":
            number = proposal(trial)["history_seen"]["trial"]
            # A first stage may leave its proposal to a later one.
            assert number == trial.number or origins[number] == "startup"
    numbers = [request.trial_number for request in requests]
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) <= origins.count("llm") + 1  # One for a trial that nobody runs.


def test_a_proposal_whose_trial_ran_elsewhere_is_taken_by_the_next() -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=PROMPTS[:1]))
    stage = ToyObjective(SPACE)
    study.optimize(stage, n_trials=1)
    until(lambda: len(provider.asked) == 1)
    other = optuna.load_study(
        study_name=study.study_name,
        storage=study._storage,
        sampler=LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:1]),
    )
    other.optimize(stage, n_trials=1)
    study.optimize(stage, n_trials=1)
    assert proposal(study.trials[2])["meta_prompt"] == provider.asked[0].prompt


@pytest.mark.parametrize("n_trials", [1, 2])
def test_nothing_is_prefetched_for_a_first_stage(n_trials: int) -> None:
    provider = Slow()
    study = optuna.create_study(sampler=sampler_of(provider, startup_prompts=PROMPTS[:3]))
    study.optimize(ToyObjective(SPACE), n_trials=n_trials)
    assert provider.asked == []
