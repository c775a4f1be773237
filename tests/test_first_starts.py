"""Stages without a proposal: templates that name the task, random words where it has no name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import copy
import json
import math
from pathlib import Path
import pickle
import threading
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers import PartialFixedSampler
from optuna.storages import JournalStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import first_starts
from optuna_llm_catalyst import history
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import MutationProposer
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import records
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.proposers.templates import fill
from optuna_llm_catalyst.proposers.templates import filled
from optuna_llm_catalyst.proposers.templates import read
from tests.conftest import sqlite_storage
from tests.ollama_server import Fault
from tests.ollama_server import OllamaServer
from tests.toy_stage import loss
from tests.toy_stage import reply
from tests.toy_stage import run_python
from tests.toy_stage import told
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space
from tests.toy_stage import WORDS


TASK: dict[str, Any] = {"task_description": "Sort questions.", "labels": ["yes", "no"]}
NAMED = sorted({word for text in filled(read(*TASK.values())) for word in text.split()})
SPACE = word_space(7, ["a", *dict.fromkeys([*WORDS, *NAMED])])
TEMPLATES = [SPACE.without_padding(prompt) for prompt in fill(SPACE, *TASK.values())]
#: What an LLM may say: none of it is a template.
SAID = [" ".join(WORDS[i : i + 7]) for i in range(1, 70, 7)]


def sampler_of(seed: int | None = 5, **arguments: Any) -> LLMCatalystSampler:
    return LLMCatalystSampler(SPACE, **{**TASK, "seed": seed, **arguments})


def run(sampler: BaseSampler, n_trials: int, **arguments: Any) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, load_if_exists=True, study_name="s", **arguments)
    study.optimize(ToyObjective(SPACE), n_trials=n_trials)
    return study


def origins(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["origin"] for trial in study.trials]


def prompts(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["prompt"] for trial in study.trials]


def without_llm(seed: int | None = 5) -> LLMCatalystSampler:
    return sampler_of(seed)


def failing_llm(seed: int | None = 5) -> LLMCatalystSampler:
    """An LLM that answers once, and is of no use before and after."""
    replies = ["I'd rather not.", reply(*SAID[:2]), "Not now."]
    return sampler_of(seed, llm=ReplayProvider(replies), startup_prompts=["calm topic"])


SAMPLERS = pytest.mark.parametrize("make", [without_llm, failing_llm])


@SAMPLERS
def test_the_same_seed_gives_the_same_study(
    make: Callable[[int | None], LLMCatalystSampler],
) -> None:
    assert told(run(make(5), 10)) == told(run(make(5), 10))
    assert prompts(run(make(5), 6)) != prompts(run(make(6), 6))
    assert prompts(run(make(None), 6)) != prompts(run(make(None), 6))


@SAMPLERS
@pytest.mark.parametrize("first", [1, 3, 9])
def test_a_study_that_is_resumed_among_its_templates_is_the_same(
    make: Callable[[], LLMCatalystSampler], first: int, tmp_path: Path
) -> None:
    straight = told(run(make(), 10))
    for n_trials in (first, 10 - first):
        with sqlite_storage(tmp_path / "study.db") as storage:
            resumed = told(run(make(), n_trials, storage=storage))
    assert resumed == straight
    assert {origin for *_, origin in straight} >= {"template"}


def run_and_print(make: str) -> None:
    print(json.dumps(told(run(globals()[make](), 6))))


@SAMPLERS
def test_another_process_chooses_the_same_templates(
    make: Callable[[], LLMCatalystSampler],
) -> None:
    code = f"from tests.test_first_starts import run_and_print; run_and_print({make.__name__!r})"
    assert json.loads(run_python(code)) == json.loads(json.dumps(told(run(make(), 6))))


@SAMPLERS
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_chooses_the_same_templates(
    make: Callable[[], LLMCatalystSampler],
    twin_of: Callable[[LLMCatalystSampler], LLMCatalystSampler],
) -> None:
    sampler = make()
    twin = twin_of(sampler)
    assert told(run(twin, 6)) == told(run(sampler, 6)) == told(run(twin_of(sampler), 6))


# Without an LLM.


def test_without_an_llm_eight_templates_come_before_mutations() -> None:
    study = run(sampler_of(), 10)
    assert origins(study) == ["template"] * 8 + ["mutation"] * 2
    assert len(set(prompts(study))) == 10
    assert {*prompts(study)[:8]} <= {*TEMPLATES}


@pytest.mark.parametrize("proposer", [None, MutationProposer(signal_probability=0.0)])
@pytest.mark.parametrize(("n_startup_trials", "n_templates"), [(0, 1), (1, 1), (3, 3), (None, 5)])
def test_as_many_stages_as_asked_for_come_before_mutations(
    proposer: Any, n_startup_trials: int | None, n_templates: int
) -> None:
    """There is nothing to mutate before the first of them."""
    study = run(sampler_of(proposer=proposer, n_startup_trials=n_startup_trials), 5)
    assert origins(study) == ["template"] * n_templates + ["mutation"] * (5 - n_templates)


def test_templates_that_are_used_up_make_room_for_mutations() -> None:
    n = len(TEMPLATES)
    study = run(sampler_of(n_startup_trials=100), n + 3)
    assert Counter(prompts(study)[:n]) == Counter(TEMPLATES)
    assert origins(study) == ["template"] * n + ["mutation"] * 3


@pytest.mark.parametrize(
    "arguments", [{"startup": "random"}, {"task_description": " ", "labels": ()}]
)
def test_random_words_are_for_tasks_without_a_name_and_on_request(
    arguments: dict[str, Any],
) -> None:
    study = run(sampler_of(**arguments), 9)
    assert origins(study) == ["startup"] * 8 + ["mutation"]
    assert len(set(prompts(study))) == 9
    assert not {*prompts(study)} & {*TEMPLATES}


def test_startup_prompts_come_before_templates_and_count_among_the_first() -> None:
    study = run(sampler_of(startup_prompts=SAID[:2], n_startup_trials=4), 5)
    assert prompts(study)[:2] == SAID[:2]
    assert origins(study) == ["startup"] * 2 + ["template"] * 2 + ["mutation"]


def test_more_startup_prompts_than_first_stages_are_all_tried() -> None:
    study = run(sampler_of(startup_prompts=SAID[:3], n_startup_trials=1), 4)
    assert prompts(study)[:3] == SAID[:3]
    assert origins(study) == ["startup"] * 3 + ["mutation"]


def test_a_template_that_was_tried_in_another_way_is_not_tried_again() -> None:
    study = optuna.create_study(sampler=sampler_of(n_startup_trials=100))
    for text in TEMPLATES[1:]:
        SPACE.enqueue(study, text)
    study.optimize(ToyObjective(SPACE), n_trials=len(TEMPLATES) + 1)
    assert prompts(study)[-2] == TEMPLATES[0]
    assert origins(study)[-2:] == ["template", "mutation"]


def test_a_template_that_always_fails_is_tried_twice() -> None:
    study = optuna.create_study(sampler=sampler_of(n_startup_trials=100))
    bad = TEMPLATES[:3]
    study.optimize(
        lambda t: math.nan if SPACE.without_padding(SPACE.suggest(t)) in bad else 0.5,
        n_trials=len(TEMPLATES) + 3 + 2,
    )
    tried = Counter(prompts(study)[:-2])
    assert tried == {text: 2 if text in bad else 1 for text in TEMPLATES}
    assert origins(study)[-2:] == ["mutation"] * 2


@pytest.mark.parametrize("n_suggested", [1, 7])
def test_a_template_whose_trial_is_run_again_stays(n_suggested: int) -> None:
    study = run(sampler_of(), 1)
    trial = study.ask()
    for name in SPACE.param_names[:n_suggested]:
        trial.suggest_int(name, 0, SPACE.vocab_size - 1)
    started = SPACE.from_token_ids((records.load(trial, "proposal", dict) or {})["token_ids"])
    study.tell(trial, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[1])
    assert SPACE.suggest(study.ask()) == started
    assert origins(study)[2] == "template"


def test_workers_that_ask_at_the_same_time_take_different_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker has read the history before any other has published its prompt."""
    n_workers, from_study = 4, history.from_study
    barrier = threading.Barrier(n_workers)

    def read_together(*args: Any, **kwargs: Any) -> history.History:
        past = from_study(*args, **kwargs)
        barrier.wait(timeout=30)
        return past

    monkeypatch.setattr(history, "from_study", read_together)
    # All of them prefer the same template.
    same = np.random.SeedSequence(1)
    monkeypatch.setattr(first_starts, "seed_sequence", lambda *_: same)
    path = str(tmp_path / "journal.log")

    def suggest(number: int) -> tuple[str, str]:
        del number
        study = optuna.load_study(
            study_name="s",
            storage=JournalStorage(JournalFileBackend(path)),
            sampler=sampler_of(),
        )
        trial = study.ask()
        return SPACE.suggest(trial).text, trial.user_attrs["origin"]

    optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)))
    with ThreadPoolExecutor(n_workers) as pool:
        suggested = list(pool.map(suggest, range(n_workers)))
    assert len({text for text, _ in suggested}) == n_workers
    assert {origin for _, origin in suggested} == {"template"}


def test_a_startup_prompt_that_was_just_taken_makes_room_for_a_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = sampler_of(startup_prompts=SAID[:1])
    study, from_study = optuna.create_study(sampler=sampler), history.from_study

    def read_and_be_slow(*args: Any, **kwargs: Any) -> history.History:
        past = from_study(*args, **kwargs)
        monkeypatch.setattr(history, "from_study", from_study)
        study.tell(other := study.ask(), loss(SPACE.suggest(other)))
        return past

    monkeypatch.setattr(history, "from_study", read_and_be_slow)
    SPACE.suggest(study.ask())
    assert sorted(origins(study)) == ["startup", "template"]
    assert [(records.load(t, "proposal", dict) or {})["origin"] for t in study.trials] == [
        *origins(study)
    ]


@pytest.mark.parametrize("arguments", [{}, {"llm": ReplayProvider([])}])
def test_fixed_tokens_constrain_templates(arguments: dict[str, Any]) -> None:
    fixed = {"prompt[2]": SPACE.word_ids["river"], "prompt[6]": SPACE.word_ids["stone"]}
    study = run(PartialFixedSampler(fixed, sampler_of(**arguments)), 8)
    assert origins(study) == ["template"] * 8
    assert len(set(prompts(study))) == 8
    for trial in study.trials:
        words = trial.user_attrs["prompt"].split()
        assert (words[2], words[6]) == ("river", "stone")
        assert (records.load(trial, "proposal", dict) or {})["text"] == " ".join(words)


# With an LLM.


def llm_sampler(url: str, seed: int = 5, **arguments: Any) -> LLMCatalystSampler:
    provider = OllamaProvider("gemma3:4b", host=url)
    told = {"labels": TASK["labels"], "backoff": 0.01, "timeout": 30.0}
    proposer = LLMProposer(provider, TASK["task_description"], **told)
    # The sampler knows the task from its proposer.
    return LLMCatalystSampler(SPACE, proposer=proposer, seed=seed, **arguments)


def test_an_llm_proposes_from_the_task_alone() -> None:
    with OllamaServer([reply(*SAID[:2]), reply(SAID[2])]) as server:
        study = run(llm_sampler(server.url), 2)
        first, second = (chat["messages"][0]["content"] for chat in server.chats)
    assert prompts(study) == [SAID[0], SAID[2]]
    assert origins(study) == ["llm"] * 2
    for told_first in (
        "Task of the frozen model: Sort questions. The labels are: yes, no.",
        "No prompt has been tried yet.",
        "write from the task alone and take several points of view",
        "They must differ from each other.",
    ):
        assert told_first in first
    for told_later in ("earlier starts", "better", "every prompt above", "the good ones"):
        assert told_later not in first
        assert told_later in second
    assert "from the task alone" not in second


def test_startup_prompts_come_before_the_llm() -> None:
    with OllamaServer([reply(SAID[2])]) as server:
        study = run(llm_sampler(server.url, startup_prompts=SAID[:2]), 3)
        assert len(server.chats) == 1
    assert prompts(study) == SAID[:3]
    assert origins(study) == ["startup", "startup", "llm"]


def test_an_llm_may_have_templates_before_it() -> None:
    with OllamaServer([reply(SAID[0])]) as server:
        study = run(llm_sampler(server.url, n_startup_trials=2), 3)
        assert len(server.chats) == 1
    assert origins(study) == ["template", "template", "llm"]


def test_templates_take_the_place_of_an_llm_that_fails() -> None:
    answers = [Fault(400), reply(SAID[0]), Fault(400), reply(SAID[1])]
    with OllamaServer(answers) as server:
        study = run(llm_sampler(server.url), 4)
    assert origins(study) == ["template", "llm", "template", "llm"]
    record = records.load(study.trials[0], "proposal", dict[str, Any]) or {}
    assert record["failure"].startswith("ProviderError")
    assert record["provider"] == "ollama:gemma3:4b"
    assert study.trials[0].user_attrs["llm_seconds"] >= 0


def test_an_llm_that_always_fails_is_a_study_without_one() -> None:
    """All templates, then mutations; the breaker changes nothing of it."""
    n_trials = len(TEMPLATES) + 3
    alone = run(sampler_of(n_startup_trials=n_trials), n_trials)
    with OllamaServer(lambda _: Fault(400)) as server:
        failing = run(llm_sampler(server.url), n_trials)
        assert 0 < len(server.chats) < n_trials
    assert told(failing) == told(alone)


@pytest.mark.parametrize("startup", ["task", "random"])
def test_an_llm_that_fails_at_a_task_without_a_name(startup: str) -> None:
    proposer = LLMProposer(ReplayProvider([]), "")
    sampler = LLMCatalystSampler(
        SPACE, proposer=proposer, startup="task" if startup == "task" else "random", seed=0
    )
    assert origins(run(sampler, 3)) == ["startup", "mutation", "mutation"]


def test_a_fallback_to_templates_is_screened() -> None:
    screened: list[int] = []

    def screen(candidates: Any, study: optuna.Study) -> list[float]:
        screened.append(len(candidates))
        return [-float(i) for i in range(len(candidates))]

    study = run(sampler_of(llm=ReplayProvider([]), screen=screen, n_candidates=3), 2)
    assert screened == [3, 3]
    for trial in study.trials:
        record = records.load(trial, "proposal", dict[str, Any]) or {}
        assert record["text"] == record["candidates"][-1]["text"]
        assert {row["text"] for row in record["candidates"]} <= {*TEMPLATES}


def test_prefetching_begins_with_the_second_stage() -> None:
    with OllamaServer([reply(text) for text in SAID[:5]]) as server:
        study = run(llm_sampler(server.url, prefetch=True), 4)
    seen = [(records.load(t, "proposal", dict) or {})["history_seen"] for t in study.trials]
    assert origins(study) == ["llm"] * 4
    assert [row["trial"] for row in seen] == [0, 1, 2, 3]
    assert [row["n_in_flight"] for row in seen] == [0, 1, 1, 1]
