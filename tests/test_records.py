from __future__ import annotations

from collections.abc import Callable
import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import optuna
from optuna.distributions import IntDistribution
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import history
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_ensemble
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import record_ensemble
from optuna_llm_catalyst import record_trajectory
from optuna_llm_catalyst import records
from optuna_llm_catalyst import StudyMismatchError
from optuna_llm_catalyst import Trajectory
from optuna_llm_catalyst import TrajectoryPoint
from optuna_llm_catalyst.mistakes import EnsembleRecord
from optuna_llm_catalyst.mistakes import Mistakes
from tests.conftest import logged
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) != float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
# Quotes and characters that JSON escapes make a chunk longer than its text.
LONG = {"text": 'é"\\\n🙂' * 2_000, "numbers": list(range(500))}
TRAJECTORY = Trajectory(
    tuple(TrajectoryPoint(i, ("calm", "answer"), 1 / (i + 1), token_ids=(3, 4)) for i in range(40))
)


MISTAKES = Mistakes.of(
    ["food", "tool", "food", 'a "label"'] * 9,
    ["tool", "tool", "wild", "food\n"] * 9,
    [('é"\\\n🙂' * 200, "\ud800"), ("", None), ("\x00", ""), ("\ud800", None)] * 9,
)


class MortalStorage(InMemoryStorage):
    """A storage whose process dies after so many writes of system attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_writes_left = 1_000

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if self.n_writes_left == 0:
            raise KeyboardInterrupt
        self.n_writes_left -= 1
        super().set_trial_system_attr(trial_id, key, value)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_record_is_read_as_it_was_written(payload: dict[str, Any]) -> None:
    trial = optuna.create_study().ask()
    records.save(trial, "thing", payload)
    assert records.load(trial, "thing", Any) == payload


@pytest.mark.parametrize("payload", [{}, {"a": [1, None, True, 0.1]}, LONG])
def test_every_storage_keeps_a_record(storage: BaseStorage, payload: dict[str, Any]) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    records.save(trial, "thing", payload)
    records.save_proposal(study, study.get_trials()[0], payload)
    for seen in (trial, study.get_trials()[0]):
        assert records.load(seen, "thing", Any) == payload
        assert records.load(seen, "proposal", Any) == payload
        assert records.load(seen, "other", Any) is None


@pytest.mark.parametrize("payload", [{}, {"a": [1, None, True, 0.1]}, LONG])
def test_every_storage_keeps_a_record_of_a_study(
    storage: BaseStorage, payload: dict[str, Any]
) -> None:
    study = optuna.create_study(storage=storage, study_name="one")
    other = optuna.create_study(storage=storage, study_name="two")
    assert records.load_from_study(study, "thing", dict) is None
    for written in (LONG, payload):
        records.save_to_study(study, "thing", written)
    loaded = optuna.load_study(storage=storage, study_name="one")
    assert records.load_from_study(loaded, "thing", dict) == payload
    assert records.load_from_study(other, "thing", dict) is None


def test_an_unreadable_record_of_a_study_is_named_once() -> None:
    study = optuna.create_study(study_name="of mine")
    records.save_to_study(study, "thing", [1])
    with logged("optuna") as lines:
        for _ in range(2):
            assert records.load_from_study(study, "thing", dict) is None
    [line] = lines
    assert "'llm_catalyst:thing' of study 'of mine' cannot be read" in line
    optuna.delete_study(study_name="of mine", storage=study._storage)
    with pytest.raises(KeyError):
        records.load_from_study(study, "thing", dict)


def test_no_chunk_is_longer_than_every_storage_takes() -> None:
    study = optuna.create_study()
    records.save(study.ask(), "thing", LONG)
    attrs = study.trials[0].system_attrs
    chunks = [value for key, value in attrs.items() if key.startswith("llm_catalyst:thing:")]
    assert len(chunks) == attrs["llm_catalyst:thing"] > 1
    assert max(map(len, chunks)) == 2045


def save_thing(study: optuna.Study, trial: optuna.Trial, payload: dict[str, Any]) -> None:
    records.save(trial, "proposal", payload)


def save_proposal(study: optuna.Study, trial: optuna.Trial, payload: dict[str, Any]) -> None:
    records.save_proposal(study, frozen_view(study), payload)


def save_stale_proposal(study: optuna.Study, trial: optuna.Trial, payload: dict[str, Any]) -> None:
    """The sampler's view of its trial is from before the first record was written."""
    stale = copy.deepcopy(frozen_view(study))
    stale.system_attrs.clear()
    records.save_proposal(study, stale, payload)


def frozen_view(study: optuna.Study) -> optuna.trial.FrozenTrial:
    return study.get_trials(deepcopy=False)[0]


@pytest.mark.parametrize("save", [save_thing, save_proposal, save_stale_proposal])
@pytest.mark.parametrize("before", [None, {"text": "b" * 5_000}, {"text": "b"}])
def test_a_record_is_whole_or_absent_wherever_its_process_dies(
    before: dict[str, Any] | None, save: Callable[..., None]
) -> None:
    after = {"text": "a" * 5_000}
    seen = []
    for n_writes in range(6):
        storage = MortalStorage()
        study = optuna.create_study(storage=storage)
        trial = study.ask()
        if before is not None:
            save(study, trial, before)
        storage.n_writes_left = n_writes
        try:
            save(study, trial, after)
        except KeyboardInterrupt:
            pass
        seen.append(records.load(trial, "proposal", dict))
    assert seen[0] == before
    assert seen[-1] == after
    assert all(record in (None, before, after) for record in seen)
    # It is withdrawn before its first chunk is overwritten: never a mixture, never a lie.
    n_chunks = 3
    assert seen[1:n_chunks] == [None] * (n_chunks - 1)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_record_without_one_of_its_chunks_is_none(gone: int) -> None:
    trial = optuna.trial.FixedTrial({})
    records.save(trial, "thing", LONG)
    del trial.system_attrs[f"llm_catalyst:thing:{gone}"]
    assert records.load(trial, "thing", Any) is None


def live() -> optuna.trial.BaseTrial:
    return optuna.create_study().ask()


def fixed() -> optuna.trial.BaseTrial:
    return optuna.trial.FixedTrial({})


def frozen() -> optuna.trial.BaseTrial:
    return optuna.create_trial(value=1.0)


@pytest.mark.parametrize("make_trial", [live, fixed, frozen])
def test_a_trajectory_is_left_on_any_kind_of_trial(
    make_trial: Callable[[], optuna.trial.BaseTrial],
) -> None:
    trial = make_trial()
    assert load_trajectory(trial) is None
    record_trajectory(trial, TRAJECTORY)
    assert load_trajectory(trial) == TRAJECTORY.thinned()


def test_a_trajectory_survives_in_every_storage(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    record_trajectory(trial, TRAJECTORY)
    study.tell(trial, 1.0)
    assert load_trajectory(study.trials[0]) == TRAJECTORY.thinned()


@pytest.mark.parametrize("make_trial", [live, fixed, frozen])
def test_mistakes_are_left_on_any_kind_of_trial(
    make_trial: Callable[[], optuna.trial.BaseTrial],
) -> None:
    trial = make_trial()
    assert records.load_mistakes(trial) is None
    for mistakes in (MISTAKES, Mistakes()):
        records.record_mistakes(trial, mistakes)
        assert records.load_mistakes(trial) == mistakes
    assert load_trajectory(trial) is None


def test_an_ensemble_survives_in_every_storage(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    ensembles = [
        EnsembleRecord(3, 0.5, 0.25, MISTAKES, value=0.75),
        EnsembleRecord(1, 0.1, 1.0, value=1.0),
    ]
    for ensemble in ensembles:
        trial = study.ask()
        assert load_ensemble(trial) is None
        record_ensemble(trial, ensemble)
        study.tell(trial, 1.0)
    assert [load_ensemble(trial) for trial in study.trials] == ensembles


def test_a_loss_that_is_no_number_is_kept_as_that() -> None:
    trial = optuna.create_study().ask()
    record_ensemble(trial, EnsembleRecord(1, float("nan"), 0.5))
    kept = load_ensemble(trial)
    assert kept is not None and kept.loss != kept.loss and kept.value != kept.value


def test_mistakes_survive_in_every_storage(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    records.record_mistakes(trial, MISTAKES)
    study.tell(trial, 1.0)
    assert records.load_mistakes(study.trials[0]) == MISTAKES


@pytest.mark.parametrize(
    "payload",
    [
        [],
        {"confusions": None, "texts": []},
        {"confusions": 5, "texts": []},
        {"confusions": [5], "texts": []},
        {"confusions": [["a", "b", 1]], "texts": []},
        {"confusions": [["a", "b", 1, 2, 3]], "texts": []},
        {"confusions": [], "texts": [["only a text"]]},
        {"confusions": [], "texts": [None]},
        pytest.param({"confusions": ["abcd"], "texts": []}),
        pytest.param({"confusions": [], "texts": [[5, "a", "b"]]}),
    ],
)
def test_mistakes_of_another_version_are_none(payload: dict[str, Any]) -> None:
    trial = optuna.trial.FixedTrial({})
    records.save(trial, "mistakes", payload)
    assert records.load_mistakes(trial) is None


@pytest.mark.parametrize("chunk", ["[]", "5", "{", "", "null", '{"confusions": [[', "NaN"])
def test_mistakes_that_cannot_be_read_are_none(chunk: str) -> None:
    trial = optuna.trial.FixedTrial({})
    trial.system_attrs.update({"llm_catalyst:mistakes:0": chunk, "llm_catalyst:mistakes": 1})
    assert records.load_mistakes(trial) is None


#: JSON that is none of our records, or nearly one.
ODD_TEXTS = st.sampled_from(["", "{", "[" * 100_000, "NaN", "null", "1e999", "[]", "{}", '"a"'])
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "token_ids": st.lists(st.integers(-2, 200) | JSON, max_size=3),
        "n_truncated": JSON,
        "candidates": st.lists(
            st.fixed_dictionaries(
                {}, optional={"token_ids": st.lists(st.integers(-2, 200)), "score": JSON}
            )
            | JSON,
            max_size=2,
        )
        | JSON,
        "points": st.lists(JSON, max_size=2) | JSON,
        "confusions": JSON,
        "texts": JSON,
        "origin": JSON,
    },
)
NAMES = ["proposal", "trajectory", "mistakes", "prompt", "worker", "stage"]
TAMPERED = st.dictionaries(
    st.sampled_from(NAMES),
    st.tuples(JSON | st.just(1), JSON | ODD_TEXTS | NEARLY.map(json.dumps) | JSON.map(json.dumps)),
)


@settings(max_examples=60)
@given(
    tampered=st.lists(TAMPERED, min_size=4, max_size=4),
    marks=st.dictionaries(st.sampled_from(["asked", "answered"]), JSON),
)
def test_a_study_goes_on_whatever_its_records_hold(
    tampered: list[dict[str, tuple[Any, Any]]], marks: dict[str, Any]
) -> None:
    """Complete, pruned, failed and running trials with any JSON in any of our attributes."""
    space = word_space(3)
    study = optuna.create_study(sampler=LLMCatalystSampler(space, n_startup_trials=1, seed=0))
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    for number, (state, entries) in enumerate(zip(states, tampered, strict=True)):
        attrs: dict[str, Any] = {f"llm_catalyst:{name}": mark for name, mark in marks.items()}
        for name, (n_chunks, chunk) in entries.items():
            attrs |= {f"llm_catalyst:{name}": n_chunks, f"llm_catalyst:{name}:0": chunk}
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=0.5 if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
                params=space.to_params(space.from_token_ids([number, 2, 3])),
                distributions=dict(space.search_space),
                system_attrs=attrs,
            )
        )
    try:
        past = history.from_study(study, space, top_k=9)
    except StudyMismatchError:  # A text that may really be another tokenizer's.
        assert "prompt" in tampered[1]
        return
    assert past.n_finished == 2
    assert {ids(trial) for trial in study.trials[:2]} <= past.tried
    study.optimize(ToyObjective(space), n_trials=2)
    assert [trial.state for trial in study.trials[4:]] == [TrialState.COMPLETE] * 2


def ids(trial: optuna.trial.FrozenTrial) -> tuple[int, ...]:
    return tuple(trial.params[name] for name in word_space(3).param_names)


def candidate(*token_ids: Any, score: Any = 0.1) -> dict[str, Any]:
    return {"candidates": [{"token_ids": list(token_ids), "score": score}]}


def projected(*token_ids: int) -> dict[str, Any]:
    point = {"step": 0, "words": ["calm"], "loss": 0.5, "hard_loss": 0.1}
    return {"points": [{**point, "token_ids": list(token_ids)}]}


ATTACKS: dict[str, tuple[str, Any]] = {
    "candidate out of range": ("proposal", candidate(1, 2, 10**6)),
    "candidate below range": ("proposal", candidate(1, 2, -1)),
    "candidate too short": ("proposal", candidate(1, 2)),
    "candidate of texts": ("proposal", candidate("a", "b", "c")),
    "score is a text": ("proposal", candidate(1, 2, 3, score="low")),
    "score is NaN": ("proposal", json.loads('{"candidates": [{"token_ids": [], "score": NaN}]}')),
    "projection out of range": ("trajectory", projected(1, 2, 10**6)),
    "projection too long": ("trajectory", projected(1, 2, 3, 4)),
    "loss is a text": ("trajectory", {"points": [{"step": 0, "words": [], "loss": "low"}]}),
    "points is null": ("trajectory", {"points": None}),
    "count is a text": ("mistakes", {"confusions": [["a", "b", "1", 2]]}),
    "ensemble has no accuracy": ("ensemble", {"n_members": 1, "loss": 0.5}),
    "ensemble of a text": ("ensemble", {"n_members": "1", "loss": 0.5, "accuracy": 1}),
    "proposal is a list": ("proposal", [1, 2, 3]),
    "proposal is null": ("proposal", None),
    "published prompt out of range": ("proposal", {"token_ids": [1, 2, 10**6]}),
}


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_study_goes_on_beside_a_tampered_record(name: str, state: TrialState) -> None:
    space = word_space(3)
    study = optuna.create_study(sampler=LLMCatalystSampler(space, n_startup_trials=1, seed=0))
    study.optimize(ToyObjective(space), n_trials=1)
    trial = study.ask()
    record_name, payload = ATTACKS[name]
    text = json.dumps(payload)
    key = f"llm_catalyst:{record_name}"
    trial.storage.set_trial_system_attr(trial._trial_id, f"{key}:0", text)
    trial.storage.set_trial_system_attr(trial._trial_id, key, 1)
    if state != TrialState.RUNNING:
        space.suggest(trial)
        if record_name == "proposal":  # The sampler has written its own.
            trial.storage.set_trial_system_attr(trial._trial_id, f"{key}:0", text)
        study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
    study.optimize(ToyObjective(space), n_trials=2)
    assert history.from_study(study, space, top_k=20).n_finished >= 3


@pytest.mark.parametrize("name", ATTACKS)
def test_a_retried_trial_outlives_a_tampered_record(name: str) -> None:
    """Optuna's retry copies the records of the trial that died."""
    space = word_space(3)
    study = optuna.create_study(sampler=LLMCatalystSampler(space, seed=0))
    record_name, payload = ATTACKS[name]
    key = f"llm_catalyst:{record_name}"
    attrs = {f"{key}:0": json.dumps(payload), key: 1, "fixed_params": {}}
    study.add_trial(optuna.create_trial(state=TrialState.WAITING, system_attrs=attrs))
    study.optimize(ToyObjective(space), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


UNREADABLE = [
    ("proposal", records.ProposalRecord, {"candidates": [{"token_ids": [1], "score": "low"}]}),
    ("proposal", records.ProposalRecord, {"candidates": {}}),
    ("proposal", records.ProposalRecord, {"token_ids": [1, 2.5]}),
    ("proposal", records.ProposalRecord, []),
    ("trajectory", Trajectory, {"points": [{"step": 0, "words": [], "loss": "0.5"}]}),
    ("trajectory", Trajectory, {"points": [{"step": 1, "words": "ab", "loss": 1}]}),
    ("trajectory", Trajectory, {"points": [{"step": s, "words": [], "loss": 1} for s in (1, 0)]}),
    ("mistakes", Mistakes, {"confusions": [["a", "b", 1, True]]}),
    ("ensemble", EnsembleRecord, {"n_members": 1.5, "loss": 0.5, "accuracy": 1}),
    ("ensemble", EnsembleRecord, [1, 0.5, 1]),
    ("prompt", str, ["calm"]),
]


@pytest.mark.parametrize(("name", "kind", "payload"), UNREADABLE)
def test_an_unreadable_record_is_absent_and_named_once(
    name: str, kind: type, payload: Any
) -> None:
    records._name_unreadable.cache_clear()
    trial = optuna.trial.FixedTrial({}, number=7)
    records.save(trial, name, payload)
    with logged("optuna.optuna_llm_catalyst.records") as lines:
        for _ in range(3):
            assert records.load(trial, name, kind) is None
    (line,) = lines
    assert line.startswith(f"The record 'llm_catalyst:{name}' of trial 7 cannot be read")


def test_unreadable_records_of_two_studies_are_both_named() -> None:
    with logged("optuna.optuna_llm_catalyst.records") as lines:
        for _ in range(2):
            trial = optuna.create_study().ask()
            records.save(trial, "prompt", ["calm"])
            assert records.load(trial, "prompt", str) is None
    assert len(lines) == 2


@pytest.mark.parametrize("n_chunks", ["1", 1.0, [], {}, -1, 0, 10**30, True])
@pytest.mark.parametrize("chunk", [None, 5, [], "[" * 100_000, "9" * 5_000, "\ud800"])
def test_chunks_of_any_kind_are_absent(n_chunks: Any, chunk: Any) -> None:
    trial = optuna.trial.FixedTrial({})
    trial.system_attrs.update({"llm_catalyst:thing": n_chunks, "llm_catalyst:thing:0": chunk})
    assert records.load(trial, "thing", records.ProposalRecord) is None


@pytest.mark.parametrize("number", [None, "0", 7])
def test_a_mark_of_another_trial_is_none_of_this_one(number: Any) -> None:
    study = optuna.create_study()
    trial = study.ask()
    assert not records.has_own_proposal(study.trials[0])
    trial.storage.set_trial_system_attr(trial._trial_id, "llm_catalyst:asked", number)
    assert not records.has_own_proposal(study.trials[0])
    records.mark_proposal_started(study, study.trials[0])
    assert records.has_own_proposal(study.trials[0])


def test_nan_never_reaches_a_storage() -> None:
    trial = optuna.create_study().ask()
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.save(trial, "thing", {"loss": float("nan")})
    assert records.load(trial, "thing", Any) is None


def test_all_trials_are_seen_as_they_are_now(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    assert [t.state for t in records.all_trials(study)] == [TrialState.RUNNING]
    study.tell(trial, 1.0)
    study.enqueue_trial({"x": 1})
    states = [t.state for t in records.all_trials(study)]
    assert states == [TrialState.COMPLETE, TrialState.WAITING]


def test_a_started_trial_passes_by_the_queue(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 1})
    trial = records.start_trial(study, {"x": 2}, {"x": IntDistribution(0, 9)}, {"note": "b"})
    assert trial.suggest_int("x", 0, 9) == 2
    study.tell(trial, 1.0)
    assert [t.state for t in study.trials] == [TrialState.WAITING, TrialState.COMPLETE]
    assert study.trials[1].user_attrs == {"note": "b"}


@given(st.text(max_size=50), st.integers(0, 60))
def test_a_clipped_text_says_how_much_is_gone(text: str, limit: int) -> None:
    clipped = records.clip(text, limit)
    if len(text) <= limit:
        assert clipped == text
    else:
        assert clipped == f"{text[:limit]}… [{len(text) - limit} characters cut]"
