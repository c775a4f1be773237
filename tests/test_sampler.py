from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import copy
import json
import math
from pathlib import Path
import pickle
import re
import threading
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
from optuna.testing.pytest_samplers import SingleOnlySamplerTestCase
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import history
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import MutationProposer
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import records
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst import RestartPrompt
from optuna_llm_catalyst.proposers import Proposal
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.study_check import check_trials
from tests.conftest import logged
from tests.conftest import sqlite_storage
from tests.toy_stage import loss
from tests.toy_stage import reply
from tests.toy_stage import run_python
from tests.toy_stage import texts
from tests.toy_stage import told
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space
from tests.toy_stage import WORDS


SPACE = word_space(3)
PROMPTS = texts(20)


def test_workers_that_ask_at_the_same_time_try_different_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker has read the history before any other has published its prompt."""
    n_workers = 4
    barrier = threading.Barrier(n_workers)

    from_study = history.from_study

    def read_together(*args: Any, **kwargs: Any) -> history.History:
        past = from_study(*args, **kwargs)
        barrier.wait(timeout=30)
        return past

    monkeypatch.setattr(history, "from_study", read_together)
    path = str(tmp_path / "journal.log")

    def suggest(number: int) -> str:
        del number
        study = optuna.load_study(
            study_name="s",
            storage=JournalStorage(JournalFileBackend(path)),
            sampler=LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:2], seed=0),
        )
        return SPACE.suggest(study.ask()).text

    optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)))
    with ThreadPoolExecutor(n_workers) as pool:
        suggested = list(pool.map(suggest, range(n_workers)))
    assert len(set(suggested)) == n_workers


def test_a_prompt_that_another_worker_just_finished_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one starts and ends between this one's look at the history and its choice."""
    sampler = LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:2], seed=0)
    study, from_study = optuna.create_study(sampler=sampler), history.from_study

    def read_and_be_slow(*args: Any, **kwargs: Any) -> history.History:
        past = from_study(*args, **kwargs)
        monkeypatch.setattr(history, "from_study", from_study)
        study.tell(other := study.ask(), len(SPACE.suggest(other).text))
        return past

    monkeypatch.setattr(history, "from_study", read_and_be_slow)
    SPACE.suggest(study.ask())
    assert {t.user_attrs["prompt"] for t in study.trials} == {*PROMPTS[:2]}


def test_a_startup_prompt_that_always_fails_blocks_nothing() -> None:
    study = optuna.create_study(
        sampler=LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:2], seed=0)
    )
    study.optimize(
        lambda trial: math.nan if SPACE.suggest(trial).text == PROMPTS[0] else 0.5, n_trials=4
    )
    tried = [trial.user_attrs["prompt"] for trial in study.trials]
    assert tried[:3] == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert tried[3] not in PROMPTS[:2]


class Answering:
    """A provider that answers by a function of how often it was asked, and counts."""

    name = "answering:test"
    max_prompt_tokens = None

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.asked: list[CompletionRequest] = []
        self._answer = answer

    def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        answer = self._answer(len(self.asked) - 1)
        return answer if not isinstance(answer, str) else Completion(answer, "test")


def raising(error: BaseException) -> Answering:
    def answer(_: int) -> str:
        raise error

    return Answering(answer)


def always(*prompts: str) -> Answering:
    return Answering(lambda _: reply(*prompts))


def screen_by_loss(prompts: Sequence[RestartPrompt], study: optuna.Study) -> list[float]:
    del study
    return [loss(prompt) for prompt in prompts]


def replay_sampler(seed: int | None = 5) -> LLMCatalystSampler:
    """A sampler with an LLM, screening, random first stages and a fallback now and then."""
    replies = [reply(PROMPTS[2 * i], PROMPTS[2 * i + 1], "calm answer quick") for i in range(6)]
    replies[2] = "I'd rather not."
    return LLMCatalystSampler(
        SPACE, ReplayProvider(replies), n_startup_trials=3, screen=screen_by_loss, seed=seed
    )


def mutation_sampler(seed: int | None = 5) -> LLMCatalystSampler:
    return LLMCatalystSampler(SPACE, startup="random", n_startup_trials=3, seed=seed)


def run(sampler: BaseSampler, n_trials: int = 10, **arguments: Any) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, load_if_exists=True, study_name="s", **arguments)
    study.optimize(ToyObjective(SPACE), n_trials=n_trials)
    return study


def origins(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["origin"] for trial in study.trials]


def prompts(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["prompt"] for trial in study.trials]


def proposal(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    found = records.load(trial, "proposal", dict[str, Any])
    assert found is not None
    return found


class TestOptunasSuiteWithoutAPrompt(
    BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return LLMCatalystSampler


class TestOptunasSuiteWithAPrompt(
    BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: LLMCatalystSampler(SPACE, always(*PROMPTS[:4]), n_startup_trials=1)


SAMPLERS = pytest.mark.parametrize("make", [replay_sampler, mutation_sampler])


@SAMPLERS
def test_the_same_seed_gives_the_same_study(
    make: Callable[[int | None], LLMCatalystSampler],
) -> None:
    assert told(run(make(5))) == told(run(make(5)))
    assert prompts(run(make(5))) != prompts(run(make(6)))
    assert prompts(run(make(None))) != prompts(run(make(None)))


@SAMPLERS
def test_a_resumed_study_is_the_same_study(
    make: Callable[[], LLMCatalystSampler], tmp_path: Path
) -> None:
    straight = told(run(make()))
    for n_trials in (5, 5):
        with sqlite_storage(tmp_path / "study.db") as storage:
            resumed = told(run(make(), n_trials, storage=storage))
    assert resumed == straight
    assert {origin for *_, origin in straight} >= {"startup", "mutation"}


def run_and_print(make: str) -> None:
    print(json.dumps(told(run(globals()[make]()))))


@SAMPLERS
def test_the_same_seed_gives_the_same_study_in_another_process(
    make: Callable[[], LLMCatalystSampler],
) -> None:
    code = f"from tests.test_sampler import run_and_print; run_and_print({make.__name__!r})"
    there = json.loads(run_python(code))
    assert there == json.loads(json.dumps(told(run(make()))))


@SAMPLERS
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))]
)
def test_copies_made_before_and_after_use_are_equal(
    make: Callable[[], LLMCatalystSampler],
    twin_of: Callable[[LLMCatalystSampler], LLMCatalystSampler],
) -> None:
    sampler = make()
    unused = twin_of(sampler)
    study = run(sampler)
    assert told(run(unused)) == told(study)
    assert told(run(twin_of(sampler))) == told(study)
    assert told(run(sampler)) == told(study)


def test_two_threads_finish_their_trials(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage, sampler=replay_sampler())
    study.optimize(ToyObjective(SPACE), n_trials=6, n_jobs=2)
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(SPACE.decode(trial).text == trial.user_attrs["prompt"] for trial in study.trials)
    check_trials(SPACE, study.trials)


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (raising(ProviderError("the line is dead")), "ProviderError: the line is dead"),
        (raising(RuntimeError("boom")), "RuntimeError: boom"),
        (raising(KeyError("model")), "KeyError: 'model'"),
        (raising(RecursionError()), "RecursionError: "),
        (Answering(lambda _: None), "AttributeError: .*NoneType"),
        (Answering(lambda _: Completion(None, "test")), "TypeError: "),  # type: ignore[arg-type]
        (Answering(lambda _: "I'd rather not."), "InvalidReplyError: the reply has no object"),
        (Answering(lambda _: ""), "InvalidReplyError: the reply is empty"),
        (Answering(lambda _: reply()), "InvalidReplyError: .* list of prompts is empty"),
        (always("qqq", "zzz"), "none of the 2 prompts can be used .* no word of it"),
        (always(PROMPTS[0], PROMPTS[1]), "none of the 2 prompts can be used .* tried before"),
        (ReplayProvider([]), "ProviderError: list has no reply to attempt 0 of trial 2"),
    ],
)
def test_a_trial_says_why_its_llm_failed(provider: Any, reason: str) -> None:
    sampler = LLMCatalystSampler(SPACE, provider, startup_prompts=PROMPTS[:2], seed=0)
    study = run(sampler, 4)
    assert origins(study) == ["startup", "startup", "mutation", "mutation"]
    assert len(set(prompts(study))) == 4
    record = proposal(study.trials[2])
    assert re.match(reason, record["failure"])
    assert record["text"] == study.trials[2].user_attrs["prompt"]
    assert study.trials[2].user_attrs["llm_seconds"] >= 0
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_only_ctrl_c_stops_a_study() -> None:
    sampler = LLMCatalystSampler(
        SPACE, raising(KeyboardInterrupt()), startup_prompts=PROMPTS[:1], seed=0
    )
    with pytest.raises(KeyboardInterrupt):
        run(sampler, 2)


@pytest.mark.parametrize(
    "details",
    [
        {"when": object()},
        {"loss": float("nan")},
        {("a", "b"): 1},
        {"origin": "elsewhere", "candidates": 3, "token_ids": [], "failure": "no", "text": ""},
    ],
)
def test_odd_details_of_a_provider_break_no_trial(details: dict[Any, Any]) -> None:
    provider = Answering(lambda i: Completion(reply(PROMPTS[i + 1]), "test", details=details))
    study = run(LLMCatalystSampler(SPACE, provider, startup_prompts=PROMPTS[:1], seed=0), 3)
    assert prompts(study) == PROMPTS[:3]
    assert origins(study) == ["startup", "llm", "llm"]
    record = proposal(study.trials[1])
    assert (record["text"], record["origin"]) == (PROMPTS[1], "llm")
    assert record["failure"] is None
    assert [candidate["text"] for candidate in record["candidates"]] == [PROMPTS[1]]


def test_an_enqueued_prompt_is_kept_and_no_llm_is_asked() -> None:
    provider = always(PROMPTS[9])
    study = run(LLMCatalystSampler(SPACE, provider, n_startup_trials=1, seed=0), 1)
    SPACE.enqueue(study, "silver river stone")
    SPACE.enqueue(study, "calm answer quick", learning_rate=0.25)
    study.optimize(ToyObjective(SPACE), n_trials=2)
    assert prompts(study)[1:] == ["silver river stone", "calm answer quick"]
    assert origins(study)[1:] == ["enqueued", "enqueued"]
    assert study.trials[2].params["learning_rate"] == 0.25
    assert provider.asked == []
    study.optimize(ToyObjective(SPACE), n_trials=1)
    assert prompts(study)[3] == PROMPTS[9]
    assert len(provider.asked) == 1


def test_startup_prompts_come_first_and_in_their_order() -> None:
    provider = always(PROMPTS[9], PROMPTS[10])
    sampler = LLMCatalystSampler(SPACE, provider, startup_prompts=PROMPTS[:3], seed=0)
    study = run(sampler, 4)
    assert prompts(study) == [*PROMPTS[:3], PROMPTS[9]]
    assert origins(study) == ["startup"] * 3 + ["llm"]


def test_beyond_its_startup_prompts_a_study_starts_from_random_words() -> None:
    provider = always(PROMPTS[9])
    sampler = LLMCatalystSampler(
        SPACE, provider, startup_prompts=PROMPTS[:1], n_startup_trials=3, seed=0
    )
    study = run(sampler, 4)
    assert origins(study) == ["startup"] * 3 + ["llm"]
    assert len(set(prompts(study))) == 4
    assert {word for text in prompts(study)[1:3] for word in text.split()} <= set(SPACE.words)


def test_workers_share_the_startup_prompts(storage: BaseStorage) -> None:
    samplers = [
        LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:4], seed=seed) for seed in (0, 1)
    ]
    optuna.create_study(storage=storage, study_name="s")
    studies = [optuna.load_study(study_name="s", storage=storage, sampler=s) for s in samplers]
    running = []
    for study in studies * 2:
        trial = study.ask()
        assert SPACE.suggest(trial).text == PROMPTS[len(running)]
        running.append((study, trial))
    for study, trial in running:
        study.tell(trial, 1.0)
    assert prompts(studies[0]) == PROMPTS[:4]


def test_a_startup_prompt_whose_stage_failed_is_tried_again() -> None:
    study = optuna.create_study(
        sampler=LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:2], seed=0)
    )
    for state in (TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE):
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    assert prompts(study) == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]


def test_what_is_tried_is_not_tried_again() -> None:
    provider = always(PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[2], PROMPTS[3])
    sampler = LLMCatalystSampler(
        SPACE, provider, startup_prompts=PROMPTS[:1], n_candidates=5, seed=0
    )
    study = run(sampler, 1)
    SPACE.enqueue(study, PROMPTS[1])
    running = study.ask()
    SPACE.suggest(running)
    next_trial = study.ask()
    assert SPACE.suggest(next_trial).text == PROMPTS[2]
    record = proposal(study.trials[2])
    assert [c["text"] for c in record["candidates"]] == [PROMPTS[2], PROMPTS[3]]
    asked = provider.asked[0].prompt.partition("Being tried right now")
    assert f'"{PROMPTS[0]}"' in asked[0]
    assert f'"{PROMPTS[1]}"' in asked[2]


NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("direction", "scores", "best"),
    [
        ("minimize", [3.0, 1.0, 2.0], 1),
        ("maximize", [3.0, 1.0, 2.0], 0),
        ("minimize", [3.0, 1.0, 1.0], 1),
        ("minimize", [NAN, 2.0, 1.0], 2),
        ("maximize", [NAN, 2.0, 1.0], 1),
        ("minimize", [-INF, 2.0, NAN], 1),
        ("maximize", [INF, 2.0, NAN], 1),
        ("minimize", [NAN, NAN, NAN], 0),
    ],
)
def test_the_candidate_that_screens_best_is_tried(
    direction: str, scores: list[float], best: int
) -> None:
    screened = []

    def screen(candidates: Sequence[RestartPrompt], study: optuna.Study) -> list[float]:
        screened.append((study, [candidate.text for candidate in candidates]))
        return scores

    sampler = LLMCatalystSampler(
        SPACE, always(*PROMPTS[:3]), startup_prompts=["calm answer quick"], screen=screen, seed=0
    )
    study = run(sampler, 2, direction=direction)
    assert prompts(study)[1] == PROMPTS[best]
    assert screened == [(study, PROMPTS[:3])]
    recorded = [candidate["score"] for candidate in proposal(study.trials[1])["candidates"]]
    assert recorded == [
        None if score in (INF, -INF) or score != score else score for score in scores
    ]


def test_without_a_screen_the_first_candidate_is_tried() -> None:
    sampler = LLMCatalystSampler(SPACE, always(*PROMPTS[:3]), n_startup_trials=1, seed=0)
    study = run(sampler, 2)
    assert prompts(study)[1] == PROMPTS[0]
    assert [c["score"] for c in proposal(study.trials[1])["candidates"]] == [None] * 3


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 4])
def test_a_screen_of_the_wrong_length_raises(scores: list[float]) -> None:
    sampler = LLMCatalystSampler(
        SPACE, always(*PROMPTS[:3]), n_startup_trials=1, screen=lambda *_: scores
    )
    with pytest.raises(ValueError, match=rf"`screen` .* got {len(scores)} for 3\."):
        run(sampler, 2)


def test_other_parameters_are_sampled_jointly_once_there_is_one() -> None:
    study = optuna.create_study(sampler=LLMCatalystSampler(SPACE, seed=0))
    seen = []
    for _ in range(2):
        trial = study.ask()
        ToyObjective(SPACE)(trial)
        seen.append(trial.relative_params.keys())
        study.tell(trial, 1.0)
    names = set(SPACE.param_names)
    assert seen == [names, names | {"learning_rate"}]


def test_what_is_screened_fills_the_next_meta_prompt() -> None:
    provider = Answering(lambda i: reply(PROMPTS[2 * i], PROMPTS[2 * i + 1]))
    sampler = LLMCatalystSampler(
        SPACE, provider, n_startup_trials=1, screen=screen_by_loss, n_candidates=2, seed=0
    )
    run(sampler, 3)
    assert PROMPTS[0] not in provider.asked[0].prompt
    assert all(f'"{text}"' in provider.asked[1].prompt for text in PROMPTS[:2])


def test_a_study_that_maximizes_says_so() -> None:
    provider = Answering(lambda i: reply(PROMPTS[i]))
    study = run(
        LLMCatalystSampler(SPACE, provider, n_startup_trials=2, seed=0), 6, direction="maximize"
    )
    best = history.from_study(study, SPACE, top_k=1).points[0]
    assert best.value == max(trial.value for trial in study.trials if trial.value is not None)
    assert all("higher is better" in request.prompt for request in provider.asked)
    assert len(provider.asked) == 4


def test_the_prompt_asks_for_what_the_arguments_say() -> None:
    provider = always(PROMPTS[9])
    sampler = LLMCatalystSampler(
        SPACE,
        provider,
        task_description="Sort messages.",
        labels=["billing", "delivery"],
        n_startup_trials=3,
        n_candidates=7,
        top_k=2,
        seed=3,
    )
    study = run(sampler, 4)
    (request,) = provider.asked
    assert "Sort messages. The labels are: billing, delivery." in request.prompt
    assert "Write 7 new prompts" in request.prompt
    assert request.schema["properties"]["prompts"]["minItems"] == 7
    assert sum(f'"{text}"' in request.prompt for text in prompts(study)) == 2
    assert (request.trial_number, request.proposal_index) == (3, 0)
    assert 0 <= request.seed < 2**31


def test_a_bracket_of_hyperband_is_a_study_like_any_other() -> None:
    """The LLM sees the stages of all brackets, the pruned ones with their best loss."""

    def objective(trial: optuna.Trial) -> float:
        value = loss(SPACE.suggest(trial))
        for step in range(9):
            trial.report(value + (step - 2) ** 2 / 100, step)  # Best at step 2.
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    provider = Answering(lambda i: reply(PROMPTS[i + 2]))
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    sampler = LLMCatalystSampler(SPACE, provider, startup_prompts=PROMPTS[:2], seed=0, top_k=30)
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name="s")
    study.optimize(objective, n_trials=12)
    assert origins(study) == ["startup"] * 2 + ["llm"] * 10
    assert len({pruner._get_bracket_id(study, trial) for trial in study.trials}) > 1
    pruned = [trial for trial in study.trials[:-1] if trial.state == TrialState.PRUNED]
    assert pruned
    told_last = provider.asked[-1].prompt
    assert all(f'"{text}"' in told_last for text in prompts(study)[:-1])
    for trial in pruned:
        (line,) = [row for row in told_last.splitlines() if trial.user_attrs["prompt"] in row]
        best = min(trial.intermediate_values.values())
        assert f"{best:.3f} after" in line
        assert line.endswith("stopped early")


def test_a_fixed_learning_rate_leaves_the_prompt_to_the_llm() -> None:
    sampler = LLMCatalystSampler(SPACE, always(PROMPTS[9]), n_startup_trials=1, seed=0)
    study = run(PartialFixedSampler({"learning_rate": 0.5}, sampler), 2)
    assert [trial.params["learning_rate"] for trial in study.trials] == [0.5] * 2
    assert prompts(study)[1] == PROMPTS[9]


def in_one(sampler: BaseSampler) -> BaseSampler:
    return PartialFixedSampler({"prompt[1]": 7}, sampler)


def in_two(sampler: BaseSampler) -> BaseSampler:
    inner = PartialFixedSampler({"prompt[1]": 9, "prompt[2]": 8}, sampler)
    return PartialFixedSampler({"prompt[1]": 7}, inner)


def in_an_integer_of_numpy(sampler: BaseSampler) -> BaseSampler:
    return PartialFixedSampler({"prompt[1]": np.int64(7)}, sampler)


class Forgetful:
    """A proposer that does not know what is fixed."""

    def propose(self, request: ProposalRequest) -> Proposal:
        number = request.trial_number
        candidates = [SPACE.from_text(text) for text in PROMPTS[number : number + 3]]
        return Proposal(tuple(candidates), "llm", {})


@pytest.mark.parametrize("fix", [in_one, in_two, in_an_integer_of_numpy])
@pytest.mark.parametrize(
    "arguments",
    [
        lambda: {"llm": Answering(lambda i: reply(PROMPTS[i + 3], PROMPTS[i + 4]))},
        lambda: {"proposer": Forgetful()},
        lambda: {"proposer": Forgetful(), "screen": screen_by_loss},
        lambda: {"proposer": MutationProposer()},
        lambda: {"llm": raising(ProviderError("the line is dead"))},
    ],
    ids=["llm", "proposer", "screened", "mutation", "broken"],
)
def test_fixed_tokens_constrain_every_proposal(
    fix: Callable[[BaseSampler], BaseSampler], arguments: Callable[[], dict[str, Any]]
) -> None:
    sampler = LLMCatalystSampler(
        SPACE, startup_prompts=PROMPTS[:2], n_startup_trials=3, seed=0, **arguments()
    )
    study = run(fix(sampler), 8)
    assert len(set(prompts(study))) == 8
    for trial in study.trials:
        token_ids = [trial.params[name] for name in SPACE.param_names]
        assert token_ids[1] == 7
        assert fix is not in_two or token_ids[2] == 8
        record = proposal(trial)
        # The record names the prompt that runs, and no candidate breaks the constraint.
        assert record["token_ids"] == token_ids
        assert record["text"] == trial.user_attrs["prompt"] == SPACE.decode(trial).text
        assert all(row["token_ids"][1] == 7 for row in record.get("candidates", []))
    startup = [SPACE.from_text(text).token_ids[0] for text in PROMPTS[:2]]
    assert [trial.params["prompt[0]"] for trial in study.trials[:2]] == startup


def test_a_fixed_token_does_not_silence_the_llm() -> None:
    sampler = LLMCatalystSampler(SPACE, proposer=Forgetful(), n_startup_trials=1, seed=0)
    assert origins(run(in_one(sampler), 3)) == ["startup", "llm", "llm"]


def test_a_prompt_that_is_all_fixed_needs_no_proposal() -> None:
    provider = always(PROMPTS[9])
    params = SPACE.to_params(SPACE.from_text(PROMPTS[3]))
    sampler = LLMCatalystSampler(SPACE, provider, n_startup_trials=1, seed=0)
    study = optuna.create_study(sampler=PartialFixedSampler(dict(params), sampler))
    study.optimize(lambda trial: loss(SPACE.suggest(trial)), n_trials=2)
    assert prompts(study) == [PROMPTS[3]] * 2
    assert provider.asked == []


def test_a_fixed_token_holds_in_a_bracket_of_hyperband() -> None:
    sampler = LLMCatalystSampler(SPACE, proposer=Forgetful(), n_startup_trials=1, seed=0)
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    study = run(in_one(sampler), 4, pruner=pruner)
    assert origins(study) == ["startup", "llm", "llm", "llm"]
    assert [proposal(trial)["token_ids"][1] for trial in study.trials] == [7] * 4


@pytest.mark.parametrize("n_startup_trials", [1, 9])
def test_a_partly_enqueued_prompt_is_recorded_as_it_runs(n_startup_trials: int) -> None:
    sampler = LLMCatalystSampler(
        SPACE, always(PROMPTS[9]), n_startup_trials=n_startup_trials, seed=0
    )
    study = run(sampler, 1)
    study.enqueue_trial({"prompt[0]": 7, "learning_rate": 0.25})
    study.optimize(ToyObjective(SPACE), n_trials=2)
    partly, after = study.trials[1:]
    assert partly.params["prompt[0]"] == 7
    assert partly.params["learning_rate"] == 0.25
    record = proposal(partly)
    assert record["token_ids"] == [partly.params[name] for name in SPACE.param_names]
    assert record["text"] == partly.user_attrs["prompt"]
    assert after.params["prompt[0]"] != 7


JUNK = [
    ({"prompt[0]": 10**6, "prompt[1]": 1, "prompt[2]": 1}, r"prompt\[0\] is 1000000"),
    ({"prompt[0]": 1, "prompt[1]": -1, "prompt[2]": 1}, r"prompt\[1\] is -1"),
    ({"prompt[1]": len(WORDS)}, rf"prompt\[1\] is {len(WORDS)}"),
    ({"prompt[2]": "calm"}, r"prompt\[2\] is 'calm'"),
    ({"prompt[2]": None}, r"prompt\[2\] is None"),
]


@pytest.mark.filterwarnings("ignore:Fixed parameter:UserWarning")
@pytest.mark.parametrize(("params", "named"), JUNK)
@pytest.mark.parametrize("attrs", [{}, {"prompt": "my own"}])
def test_a_junk_trial_that_is_enqueued_fails_alone(
    params: dict[str, Any], named: str, attrs: dict[str, Any]
) -> None:
    sampler = LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:1], seed=0)
    study = run(sampler, 2)
    innocent = study.ask()
    study.enqueue_trial(params, user_attrs=attrs)
    SPACE.suggest(innocent)  # While the junk waits.
    study.tell(innocent, 0.5)
    with pytest.raises(ValueError, match=rf"^Trial 3: {named}, .* \[0, {len(WORDS) - 1}\]"):
        study.optimize(ToyObjective(SPACE), n_trials=1)
    check_trials(SPACE, study.trials)
    study.optimize(ToyObjective(SPACE), n_trials=2)
    assert [trial.state.name for trial in study.trials] == (
        ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 2
    )


@pytest.mark.filterwarnings("ignore:Fixed parameter:UserWarning")
def test_a_junk_token_that_is_fixed_is_named() -> None:
    sampler = LLMCatalystSampler(SPACE, seed=0)
    study = optuna.create_study(sampler=PartialFixedSampler({"prompt[1]": 999}, sampler))
    with pytest.raises(ValueError, match=r"^Trial 0: prompt\[1\] is 999"):
        study.optimize(ToyObjective(SPACE), n_trials=1)


def test_junk_that_another_objective_completed_is_passed_over() -> None:
    study = optuna.create_study(sampler=LLMCatalystSampler(SPACE, n_startup_trials=2, seed=0))
    study.enqueue_trial(dict.fromkeys(SPACE.param_names, 10**6))
    with pytest.warns(UserWarning, match="out of range"):
        trial = study.ask()
        for name in SPACE.param_names:
            trial.suggest_int(name, 0, SPACE.vocab_size - 1)
    study.tell(trial, -1.0)
    study.optimize(ToyObjective(SPACE), n_trials=3)
    past = history.from_study(study, SPACE, top_k=9)
    assert past.n_finished == 3
    assert {point.trial_number for point in past.stages} == {1, 2, 3}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_user_attribute_prompt_of_ones_own_breaks_nothing(when: str) -> None:
    study = optuna.create_study(sampler=LLMCatalystSampler(SPACE, seed=0))

    def objective(trial: optuna.Trial) -> float:
        if when == "before":
            trial.set_user_attr("prompt", "summarise the e-mail")
        value = loss(SPACE.suggest(trial))
        if when == "after":
            trial.set_user_attr("prompt", "summarise the e-mail")
        return value

    study.optimize(objective, n_trials=6)
    check_trials(SPACE, study.trials)
    assert origins(study) == ["startup"] * 6
    if when == "after":
        assert prompts(study) == ["summarise the e-mail"] * 6


def test_a_live_trial_shows_its_origin() -> None:
    sampler = LLMCatalystSampler(SPACE, always(PROMPTS[9]), n_startup_trials=3, seed=0)
    study = optuna.create_study(sampler=sampler)
    seen = []
    for _ in range(4):
        trial = study.ask()
        SPACE.suggest(trial)
        seen.append((trial.user_attrs["origin"], "llm_seconds" in trial.user_attrs))
        study.tell(trial, 1.0)
    assert seen == [("startup", False)] * 3 + [("llm", True)]


@pytest.mark.parametrize("enqueued", [1, 2, 5])
def test_enqueued_prompts_use_up_no_startup_prompt(enqueued: int) -> None:
    sampler = LLMCatalystSampler(SPACE, always(PROMPTS[9]), startup_prompts=PROMPTS[:2], seed=0)
    study = optuna.create_study(sampler=sampler)
    for text in PROMPTS[10 : 10 + enqueued]:
        SPACE.enqueue(study, text)
    study.optimize(ToyObjective(SPACE), n_trials=enqueued + 3)
    assert prompts(study)[enqueued:] == [*PROMPTS[:2], PROMPTS[9]]
    assert origins(study) == ["enqueued"] * enqueued + ["startup"] * 2 + ["llm"]


def test_startup_prompts_that_are_added_later_are_tried() -> None:
    study = run(
        LLMCatalystSampler(SPACE, startup_prompts=PROMPTS[:1], n_startup_trials=1, seed=0), 3
    )
    study.sampler = LLMCatalystSampler(
        SPACE, startup_prompts=PROMPTS[:3], n_startup_trials=1, seed=0
    )
    study.optimize(ToyObjective(SPACE), n_trials=3)
    assert origins(study) == ["startup", "mutation", "mutation", "startup", "startup", "mutation"]
    assert prompts(study)[3:5] == PROMPTS[1:3]


@pytest.mark.parametrize(("text", "n_warnings"), [("calm answer quick topic", 1), ("calm", 0)])
def test_a_prompt_that_is_cut_is_named(text: str, n_warnings: int) -> None:
    with logged("optuna.optuna_llm_catalyst.prompt_space") as lines:
        LLMCatalystSampler(SPACE, startup_prompts=[text])
        SPACE.enqueue(optuna.create_study(), text)
    cut = f"The prompt {text!r} is 1 tokens too long. It is cut to 'calm answer quick'."
    assert lines == [cut] * (2 * n_warnings)


def test_failures_before_a_trial_can_be_ignored() -> None:
    """A command that has just reached the LLM does not wait for the breaker."""
    study = run(LLMCatalystSampler(SPACE, raising(ProviderError("dead")), n_startup_trials=1), 5)
    assert proposal(study.trials[4])["breaker"] == "open"
    for ignored, breaker in ((0, "open"), (5, "")):
        study.sampler = LLMCatalystSampler(
            SPACE,
            always(PROMPTS[9], PROMPTS[10]),
            n_startup_trials=1,
            ignore_failures_before=ignored,
        )
        study.optimize(ToyObjective(SPACE), n_trials=1)
        assert proposal(study.trials[-1])["breaker"] == breaker
    assert origins(study)[4:] == ["mutation", "mutation", "llm"]


@pytest.mark.parametrize("n_suggested", [1, 3])
def test_a_trial_that_is_run_again_keeps_its_answer(n_suggested: int) -> None:
    provider = Answering(lambda i: reply(PROMPTS[i]))
    study = run(LLMCatalystSampler(SPACE, provider, n_startup_trials=1, seed=0), 1)
    trial = study.ask()
    for name in SPACE.param_names[:n_suggested]:
        trial.suggest_int(name, 0, SPACE.vocab_size - 1)
    study.tell(trial, state=TrialState.FAIL)
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retry(study, study.trials[1])
    again = study.ask()
    assert SPACE.suggest(again).text == PROMPTS[0]
    assert len(provider.asked) == 1
    assert study.trials[2].user_attrs["origin"] == "llm"


class Spy(RandomSampler):
    """A sampler that keeps which of its hooks were called."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.called: list[str] = []

    def before_trial(self, *arguments: Any) -> None:
        self.called.append("before_trial")

    def after_trial(self, *arguments: Any) -> None:
        self.called.append("after_trial")

    def reseed_rng(self) -> None:
        self.called.append("reseed_rng")
        super().reseed_rng()

    def sample_independent(self, *arguments: Any) -> Any:
        self.called.append(arguments[2])
        return super().sample_independent(*arguments)


def test_a_sampler_of_ones_own_gets_the_other_parameters() -> None:
    spy = Spy()
    study = optuna.create_study(sampler=LLMCatalystSampler(SPACE, independent_sampler=spy, seed=0))
    study.optimize(ToyObjective(SPACE), n_trials=4)
    assert spy.called == ["before_trial", "learning_rate", "after_trial"] * 4


def test_a_sampler_of_ones_own_is_reseeded_in_threads() -> None:
    spy = Spy()
    study = optuna.create_study(sampler=LLMCatalystSampler(SPACE, independent_sampler=spy, seed=0))
    study.optimize(ToyObjective(SPACE), n_trials=4, n_jobs=2)
    assert spy.called.count("reseed_rng") == 4


def test_other_parameters_are_sampled_jointly_by_such_a_sampler() -> None:
    class Joint(RandomSampler):
        def infer_relative_search_space(self, *arguments: Any) -> dict[str, Any]:
            return {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)}

        def sample_relative(self, *arguments: Any) -> dict[str, Any]:
            assert arguments[2].keys() == {"learning_rate"}
            return {"learning_rate": 0.125}

    sampler = LLMCatalystSampler(SPACE, independent_sampler=Joint(), seed=0)
    study = run(sampler, 4)
    assert [trial.params["learning_rate"] for trial in study.trials] == [0.125] * 4


class Fixed:
    """A proposer that only knows one prompt."""

    def propose(self, request: ProposalRequest) -> Proposal:
        assert request.n_candidates == 4
        return Proposal((request.space.from_text("velvet valley violet"),), "refine", {"by": "me"})


def test_a_proposer_of_ones_own_is_asked() -> None:
    sampler = LLMCatalystSampler(SPACE, proposer=Fixed(), n_startup_trials=1, seed=0)
    study = run(sampler, 3)
    assert prompts(study)[1] == "velvet valley violet"
    assert origins(study) == ["startup", "refine", "mutation"]
    assert proposal(study.trials[1])["by"] == "me"
    assert proposal(study.trials[2])["failure"] == "all 1 candidates were tried before"


class Unusual:
    """A proposer of someone else, with types of its own."""

    def __init__(self, answer: Callable[[ProposalRequest], Proposal]) -> None:
        self.propose = answer


def unusual_ids(request: ProposalRequest) -> Proposal:
    ids: Any = tuple(np.int64(i) for i in SPACE.from_text(PROMPTS[request.trial_number]).token_ids)
    return Proposal((RestartPrompt("whatever", ids),), "theirs")


def no_details(request: ProposalRequest) -> Proposal:
    raise ProposalError("no idea", None)  # type: ignore[arg-type]


def like_an_llm(request: ProposalRequest) -> Proposal:
    prompt = SPACE.from_text(PROMPTS[request.trial_number])
    attempts: Any = [5, {"prompt_tokens": "many"}] if request.trial_number % 2 else None
    return Proposal((prompt,), "theirs", {"proposer": "llm", "attempts": attempts})


def by_mutation(request: ProposalRequest) -> Proposal:
    return MutationProposer().propose(request)


@pytest.mark.parametrize(
    ("answer", "origin", "failure"),
    [
        (unusual_ids, "theirs", None),
        (like_an_llm, "theirs", None),
        (no_details, "mutation", "no idea"),
        (by_mutation, "mutation", None),
    ],
)
def test_a_proposer_of_someone_else_may_be_unusual(
    answer: Callable[[ProposalRequest], Proposal], origin: str, failure: str | None
) -> None:
    sampler = LLMCatalystSampler(SPACE, proposer=Unusual(answer), n_startup_trials=1, seed=0)
    study = run(sampler, 6)
    assert origins(study) == ["startup"] + [origin] * 5
    assert proposal(study.trials[1])["failure"] == failure
    # What succeeds by mutation does not open the breaker.
    is_open = [proposal(trial).get("breaker") == "open" for trial in study.trials[1:]]
    assert any(is_open) is (failure is not None)


@pytest.mark.parametrize("proposer", [None, MutationProposer(signal_probability=0.0)])
def test_without_an_llm_prompts_mutate_and_nothing_failed(proposer: Any) -> None:
    study = run(LLMCatalystSampler(SPACE, proposer=proposer, n_startup_trials=1, seed=0), 4)
    assert origins(study) == ["startup"] + ["mutation"] * 3
    assert all(proposal(trial)["failure"] is None for trial in study.trials[1:])
    assert all("llm_seconds" not in trial.user_attrs for trial in study.trials)


def test_a_vocabulary_that_is_used_up_stops_no_study() -> None:
    space = word_space(1, words=["a", "calm", "topic"])
    study = optuna.create_study(sampler=LLMCatalystSampler(space, seed=0))
    study.optimize(lambda trial: loss(space.suggest(trial)), n_trials=8)
    assert {text for text in prompts(study)} <= {"calm", "topic"}


def test_an_llm_continues_the_history_of_any_other_sampler() -> None:
    study = run(RandomSampler(seed=0), 4)
    provider = always(PROMPTS[9])
    study.sampler = LLMCatalystSampler(SPACE, provider, seed=0)
    study.optimize(ToyObjective(SPACE), n_trials=1)
    assert prompts(study)[4] == PROMPTS[9]
    assert all(f'"{text}"' in provider.asked[0].prompt for text in prompts(study)[:4])


@pytest.mark.parametrize("words", [WORDS, [*WORDS[:40], *[""] * 40]])
def test_a_history_of_random_tokens_can_be_mutated(words: Sequence[str]) -> None:
    space = word_space(1, words)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(lambda trial: loss(space.suggest(trial)), n_trials=6)
    study.sampler = LLMCatalystSampler(space, seed=0)
    study.optimize(lambda trial: loss(space.suggest(trial)), n_trials=6)
    assert len(study.trials) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"llm": always(), "proposer": Fixed()}, "`llm` or `proposer`, not both"),
        ({"startup_prompts": "calm"}, "`startup_prompts` must be a list .* single text"),
        ({"startup_prompts": ["qqq"]}, "'qqq' has no token"),
        ({"labels": "calm"}, "`labels` must be a list .* single text"),
        ({"startup": "words"}, "`startup` must be 'task' or 'random', got 'words'"),
        ({"n_startup_trials": -1}, "`n_startup_trials` must be at least 0, got -1"),
        ({"n_candidates": 0}, "`n_candidates` must be at least 1, got 0"),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMCatalystSampler(SPACE, **arguments)
