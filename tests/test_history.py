from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import optuna
from optuna.storages import BaseStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import DriftWord
from optuna_llm_catalyst import EnsembleRecord
from optuna_llm_catalyst import history
from optuna_llm_catalyst import record_ensemble
from optuna_llm_catalyst import record_trajectory
from optuna_llm_catalyst import records
from optuna_llm_catalyst import StudyMismatchError
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst import Trajectory
from optuna_llm_catalyst import TrajectoryPoint
from optuna_llm_catalyst.mistakes import Mistakes
from tests.toy_stage import word_space
from tests.toy_stage import WORDS


SPACE = word_space(2)
WORD = st.integers(0, 1)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

Stage = tuple[tuple[int, int], float, TrialState]
STAGES = st.lists(
    st.tuples(
        st.tuples(WORD, WORD),
        st.sampled_from([0.1, 0.2, 0.3, float("inf"), -1.0]),
        st.sampled_from([*FINISHED, TrialState.FAIL, TrialState.RUNNING]),
    ),
    max_size=25,
)


def ids(text: str) -> tuple[int, ...]:
    return SPACE.from_text(text).token_ids


def texts(points: Sequence[history.HistoryPoint]) -> list[str]:
    return [point.prompt.text for point in points]


def add(
    study: optuna.Study,
    text: str,
    value: float | None,
    *,
    state: TrialState = TrialState.COMPLETE,
    candidates: Sequence[Mapping[str, Any]] = (),
    points: Sequence[TrajectoryPoint] = (),
    reported: Sequence[float] = (),
) -> optuna.Trial:
    """One trial of a prompt, told in the way that objective and sampler tell it."""
    params = SPACE.to_params(SPACE.from_text(text))
    trial = records.start_trial(study, params, SPACE.search_space, {})
    if candidates:
        records.save(trial, "proposal", {"candidates": list(candidates)})
    if points:
        record_trajectory(trial, Trajectory(tuple(points)))
    for step, reported_value in enumerate(reported):
        trial.report(reported_value, step)
    if state == TrialState.COMPLETE:
        study.tell(trial, value)
    elif state != TrialState.RUNNING:
        study.tell(trial, state=state)
    return trial


def candidate(text: str, score: float | None) -> dict[str, Any]:
    return {"text": text, "token_ids": list(ids(text)), "score": score}


def point(step: int, text: str, loss: float, **fields: Any) -> TrajectoryPoint:
    return TrajectoryPoint(step, tuple(text.split()), loss, token_ids=ids(text), **fields)


@settings(max_examples=200)
@given(stages=STAGES, top_k=st.integers(1, 6), minimize=st.booleans())
def test_the_ranking_is_that_of_the_slow_obvious_way(
    stages: list[Stage], top_k: int, minimize: bool
) -> None:
    study = optuna.create_study(direction="minimize" if minimize else "maximize")
    for token_ids, value, state in stages:
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=None if state in (TrialState.FAIL, TrialState.RUNNING) else value,
                params=SPACE.to_params(SPACE.from_token_ids(token_ids)),
                distributions=dict(SPACE.search_space),
            )
        )
    past = history.from_study(study, SPACE, top_k=top_k)

    finished = [
        (value if minimize else -value, number, token_ids)
        for number, (token_ids, value, state) in enumerate(stages)
        if state in FINISHED
    ]
    expected: dict[tuple[int, ...], int] = {}
    for _, number, token_ids in sorted(finished):
        expected.setdefault(token_ids, number)
    best = list(expected.items())[:top_k]
    assert [(p.prompt.token_ids, p.trial_number) for p in past.points] == best
    assert [p.value for p in past.points] == [stages[number][1] for _, number in best]
    assert past.n_finished == len(finished)
    assert past.minimize is minimize
    running = {token_ids for token_ids, _, state in stages if state == TrialState.RUNNING}
    assert {p.token_ids for p in past.in_flight} == running
    assert len(past.in_flight) == len(running)
    assert past.tried == running | {token_ids for *_, token_ids in finished}


def test_a_prompt_that_was_trained_often_counts_once() -> None:
    study = optuna.create_study()
    for value in (0.5, 0.1, 0.2, 0.3, 0.4, 0.1):
        add(study, "calm answer", value)
    add(study, "quick topic", 0.9)
    points = history.from_study(study, SPACE, top_k=2).points
    assert [(p.prompt.text, p.trial_number) for p in points] == [
        ("calm answer", 1),
        ("quick topic", 6),
    ]


def test_an_empty_study_is_an_empty_history() -> None:
    past = history.from_study(optuna.create_study(), SPACE, top_k=3)
    assert past == history.History()


@pytest.mark.parametrize(
    ("direction", "reported", "value"),
    [
        ("minimize", [0.9, 0.7, 0.75], 0.7),
        ("maximize", [0.1, 0.7, 0.65], 0.7),
        ("minimize", [0.9, float("nan"), 0.7, float("nan")], 0.7),
        ("minimize", [0.7], 0.7),
    ],
)
def test_a_pruned_stage_counts_with_its_best_report(
    direction: str, reported: list[float], value: float
) -> None:
    study = optuna.create_study(direction=direction)
    add(study, "calm answer", None, state=TrialState.PRUNED, reported=reported)
    add(study, "quick topic", 0.8 if direction == "minimize" else 0.6)
    past = history.from_study(study, SPACE, top_k=5)
    assert [(p.prompt.text, p.value, p.pruned) for p in past.points] == [
        ("calm answer", value, True),
        ("quick topic", 0.8 if direction == "minimize" else 0.6, False),
    ]
    assert past.outcomes[0].value == value


def test_a_stage_pruned_before_any_report_is_not_ranked() -> None:
    study = optuna.create_study()
    add(study, "calm answer", None, state=TrialState.PRUNED)
    past = history.from_study(study, SPACE, top_k=5)
    assert past.points == ()
    assert past.n_finished == 1
    assert past.tried == {ids("calm answer")}


def test_a_failed_stage_may_be_tried_again() -> None:
    study = optuna.create_study()
    add(study, "calm answer", None, state=TrialState.FAIL)
    past = history.from_study(study, SPACE, top_k=5)
    assert past == history.History(failures={ids("calm answer"): 1})


def test_a_refined_stage_says_nothing_about_its_words() -> None:
    study = optuna.create_study()
    add(study, "calm answer", 0.5)
    refined = records.start_trial(
        study,
        SPACE.to_params(SPACE.from_text("calm answer")),
        SPACE.search_space,
        {"origin": "refine"},
    )
    study.tell(refined, 0.1)
    past = history.from_study(study, SPACE, top_k=5)
    assert [point.value for point in past.points] == [0.5]


def test_a_study_of_another_space_is_refused() -> None:
    study = optuna.create_study()
    add(study, "calm answer", 0.5)
    for other in (word_space(3), word_space(1), word_space(2, words=WORDS[:40])):
        with pytest.raises(StudyMismatchError):
            history.from_study(study, other, top_k=5)


def test_what_is_no_prompt_is_not_in_flight() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"prompt[0]": 0, "prompt[1]": SPACE.vocab_size})
    assert history.from_study(study, SPACE, top_k=5).in_flight == ()


def test_trials_of_something_else_are_passed_over() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    study.ask().suggest_float("x", 0, 1)
    study.enqueue_trial({"x": 0.5, "prompt[0]": 1})
    assert history.from_study(study, SPACE, top_k=5) == history.History()


def test_what_is_in_flight_is_seen_before_its_parameters_are(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    proposed, asking = study.ask(), study.ask()
    record = {"token_ids": list(ids("calm answer"))}
    records.save_proposal(study, study.get_trials()[proposed.number], record)
    add(study, "quick topic", None, state=TrialState.RUNNING)
    SPACE.enqueue(study, "silver river")
    SPACE.enqueue(study, "silver river")
    study.ask()  # Runs what was enqueued first.
    SPACE.suggest(asking)
    past = history.from_study(study, SPACE, top_k=5, exclude=asking.number)
    assert {p.text for p in past.in_flight} == {"calm answer", "quick topic", "silver river"}
    assert len(past.in_flight) == 3
    assert past.tried == {p.token_ids for p in past.in_flight}
    assert past.n_finished == 0


def test_what_a_stage_found_out_is_told_with_its_prompt() -> None:
    study = optuna.create_study()
    helps, hurts = Swap(0, "calm", "quiet", -0.2, -0.1), Swap(1, "answer", "topic", -0.2, 0.1)
    drift = DriftWord(1, "label", 0.5)
    points = [
        point(0, "calm answer", 0.9, accuracy=0.5, swaps=(helps, hurts)),
        point(5, "calm answer", 0.6, accuracy=0.75, drift=(drift,)),
        point(9, "calm answer", 0.7, accuracy=0.7),
    ]
    add(study, "calm answer", 0.6, points=points, reported=[0.9, 0.6, 0.7])
    (told,) = history.from_study(study, SPACE, top_k=1).points
    assert (told.kind, told.before, told.value) == ("stage", 0.9, 0.6)
    assert (told.accuracy_before, told.accuracy) == (0.5, 0.75)
    assert told.swaps == (helps,)
    assert told.drift == (drift,)


@pytest.mark.parametrize(("text", "n_truncated"), [("calm answer", 2), ("quick topic", 0)])
def test_a_prompt_that_was_cut_says_so(text: str, n_truncated: int) -> None:
    """If the record is of the prompt that ran."""
    study = optuna.create_study()
    trial = add(study, "calm answer", None, state=TrialState.RUNNING)
    records.save(trial, "proposal", {"token_ids": list(ids(text)), "n_truncated": 2})
    study.tell(trial, 0.5)
    (told,) = history.from_study(study, SPACE, top_k=1).points
    assert told.prompt.text == "calm answer"
    assert told.prompt.n_truncated == n_truncated


def test_other_parameters_and_the_text_prompt_are_told_with_the_prompt() -> None:
    study = optuna.create_study()
    SPACE.enqueue(study, "calm answer")
    trial = study.ask()
    SPACE.suggest(trial)
    rate = trial.suggest_float("lr", 0.1, 0.2)
    trial.suggest_categorical("optimizer", ["sgd"])
    trial.set_user_attr("text_prompt", "of stage 3")
    study.tell(trial, 0.5)
    (told,) = history.from_study(study, SPACE, top_k=1).points
    assert told.params == {"lr": rate, "optimizer": "sgd"}
    assert told.text_prompt == "of stage 3"


ENSEMBLES = st.lists(
    st.tuples(
        st.integers(0, 4) | st.none(),
        st.sampled_from([*FINISHED, TrialState.FAIL, TrialState.RUNNING]),
    ),
    max_size=12,
)


@given(ensembles=ENSEMBLES)
def test_the_largest_and_latest_ensemble_of_a_finished_stage_is_told(
    ensembles: list[tuple[int | None, TrialState]],
) -> None:
    study = optuna.create_study()
    known = []
    for number, (n_members, state) in enumerate(ensembles):
        trial = add(study, WORDS[number + 1], None, state=TrialState.RUNNING)
        record = EnsembleRecord(n_members or 0, 0.5, number / 100, value=0.5)
        if n_members is not None:
            record_ensemble(trial, record)
        if state != TrialState.RUNNING:
            study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
        if n_members is not None and state in FINISHED:
            known.append((n_members, number, record))
    expected = max(known)[2] if known else None
    assert history.from_study(study, SPACE, top_k=1).ensemble == expected


def test_an_ensemble_that_cannot_be_read_is_passed_over() -> None:
    study = optuna.create_study()
    for payload in (EnsembleRecord(2, 0.5, 0.75, value=0.5).to_json(), {"n_members": "many"}):
        trial = add(study, WORDS[len(study.trials) + 1], None, state=TrialState.RUNNING)
        records.save(trial, "ensemble", payload)
        study.tell(trial, 0.5)
    expected = EnsembleRecord(2, 0.5, 0.75, value=0.5)
    assert history.from_study(study, SPACE, top_k=1).ensemble == expected


def test_a_stage_that_recorded_nothing_is_told_all_the_same() -> None:
    study = optuna.create_study()
    add(study, "calm answer", 0.6)
    (told,) = history.from_study(study, SPACE, top_k=1).points
    assert (told.value, told.before, told.accuracy, told.swaps) == (0.6, None, None, ())


@pytest.mark.parametrize(
    ("direction", "order"),
    [
        ("minimize", ["calm answer", "quick topic", "silver river", "green grain"]),
        ("maximize", ["calm answer", "green grain", "silver river", "quick topic"]),
    ],
)
def test_screened_candidates_fill_up_a_short_history(direction: str, order: list[str]) -> None:
    study = optuna.create_study(direction=direction)
    candidates = [
        candidate("silver river", 0.2),
        candidate("green grain", 0.3),
        candidate("quick topic", 0.1),
        candidate("calm answer", 0.9),
        candidate("olive pearl", None),
    ]
    add(study, "calm answer", 0.5, candidates=candidates)
    for top_k in (1, 2, 4, 9):
        points = history.from_study(study, SPACE, top_k=top_k).points
        assert texts(points) == order[:top_k]
        assert [p.kind for p in points] == ["stage", *["candidate"] * 3][:top_k]
    assert history.from_study(study, SPACE, top_k=9).tried == {ids("calm answer")}


def test_projections_fill_up_a_short_history_of_losses() -> None:
    points = [
        point(0, "calm answer", 0.9, hard_loss=0.9),
        point(5, "calm label", 0.6, hard_loss=0.8),
        point(7, "quiet label", 0.5, hard_loss=0.7),
        point(9, "quiet topic", 0.7, hard_loss=None),
    ]
    minimized, maximized = (optuna.create_study(direction=d) for d in ("minimize", "maximize"))
    for study in (minimized, maximized):
        add(study, "calm answer", 0.5, points=points)
    told = history.from_study(minimized, SPACE, top_k=9).points
    assert texts(told) == ["calm answer", "quiet label", "calm label"]
    assert [p.kind for p in told] == ["stage", "projection", "projection"]
    assert [p.value for p in told] == [0.5, 0.7, 0.8]
    assert texts(history.from_study(maximized, SPACE, top_k=9).points) == ["calm answer"]


def test_stages_come_before_prompts_that_were_never_trained() -> None:
    study = optuna.create_study()
    add(study, "calm answer", 0.5, candidates=[candidate("quick topic", 0.1)])
    add(study, "silver river", 0.9)
    assert texts(history.from_study(study, SPACE, top_k=3).points) == [
        "calm answer",
        "silver river",
        "quick topic",
    ]
    assert texts(history.from_study(study, SPACE, top_k=2).points) == [
        "calm answer",
        "silver river",
    ]


# Outcomes.


@settings(max_examples=100)
@given(stages=STAGES, refined=st.sets(st.integers(0, 24)), excluded=st.none() | st.integers(0, 24))
def test_outcomes_are_those_of_the_slow_obvious_way(
    stages: list[Stage], refined: set[int], excluded: int | None
) -> None:
    study = optuna.create_study()
    for number, (token_ids, value, state) in enumerate(stages):
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=value if state in FINISHED else None,
                params=SPACE.to_params(SPACE.from_token_ids(token_ids)),
                distributions=dict(SPACE.search_space),
                user_attrs={"origin": "refine" if number in refined else "llm"},
            )
        )
    past = history.from_study(study, SPACE, top_k=1, exclude=excluded)
    expected = [
        (number, token_ids, value)
        for number, (token_ids, value, state) in enumerate(stages)
        if state in FINISHED and number not in refined
    ]
    assert list(past.outcomes) == expected


def test_a_stage_without_a_value_has_no_outcome() -> None:
    study = optuna.create_study()
    add(study, "calm answer", 0.5)
    add(study, "quick topic", None, state=TrialState.PRUNED)
    add(study, "silver river", None, state=TrialState.PRUNED, reported=[0.9, 0.75])
    add(study, "green grain", None, state=TrialState.PRUNED, reported=[float("nan")])
    add(study, "olive pearl", None, state=TrialState.FAIL)
    add(study, "meadow metal", None, state=TrialState.RUNNING, reported=[0.5])
    past = history.from_study(study, SPACE, top_k=1)
    assert [(o.trial_number, o.token_ids, o.value) for o in past.outcomes] == [
        (0, ids("calm answer"), 0.5),
        (2, ids("silver river"), 0.75),
    ]


def test_a_prompt_that_was_trained_often_has_as_many_outcomes() -> None:
    study = optuna.create_study(direction="maximize")
    for value in (0.5, 0.1, 0.9):
        add(study, "calm answer", value)
    past = history.from_study(study, SPACE, top_k=1)
    assert [outcome.value for outcome in past.outcomes] == [0.5, 0.1, 0.9]
    assert len(past.points) == 1


# Trials that asked.


def frozen(study: optuna.Study, number: int) -> optuna.trial.FrozenTrial:
    return study.get_trials(deepcopy=False)[number]


def start_asking(study: optuna.Study, origin: str | None = None) -> optuna.Trial:
    """A running trial that asks, and has its answer if it has an origin."""
    trial = study.ask()
    asking = frozen(study, trial.number)
    records.mark_proposal_started(study, asking)
    if origin is not None:
        records.mark_proposal_ended(study, asking, succeeded=origin != "mutation")
        records.set_user_attr(study, asking, "origin", origin)
    return trial


@pytest.mark.parametrize(
    ("origin", "succeeded"), [("llm", True), ("mutation", False), (None, None), ("other", True)]
)
@pytest.mark.parametrize("state", [*FINISHED, TrialState.FAIL, TrialState.RUNNING])
def test_a_trial_that_asked_is_told_whatever_became_of_it(
    storage: BaseStorage, state: TrialState, origin: str | None, succeeded: bool | None
) -> None:
    study = optuna.create_study(storage=storage)
    study.tell(study.ask(), 1.0)  # It did not ask.
    trial = start_asking(study, origin)
    if state != TrialState.RUNNING:
        study.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    study.ask()
    past = history.from_study(study, SPACE, top_k=1)
    assert past.proposals == (history.PastProposal(1, succeeded),)
    assert history.from_study(study, SPACE, top_k=1, exclude=2) == past


def test_proposals_are_told_oldest_first() -> None:
    study = optuna.create_study()
    origins = ["llm", None, "mutation", "llm", None]
    for origin in origins:
        start_asking(study, origin)
    expected = [history.PastProposal(i, o and o != "mutation") for i, o in enumerate(origins)]
    for number in range(5):
        past = history.from_study(study, SPACE, top_k=1, exclude=number)
        assert list(past.proposals) == [ask for ask in expected if ask.trial_number != number]
    assert list(history.from_study(study, SPACE, top_k=1).proposals) == expected


def retried(study: optuna.Study, trial: optuna.Trial) -> optuna.Trial:
    """The trial that takes over when the process of another has died."""
    study.tell(trial, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, frozen(study, trial.number))
    return study.ask()


@pytest.mark.parametrize("origin", ["llm", "mutation", None])
def test_a_retried_trial_has_no_proposal_of_its_own(
    storage: BaseStorage, origin: str | None
) -> None:
    study = optuna.create_study(storage=storage)
    first = start_asking(study, origin)
    once = history.from_study(study, SPACE, top_k=1).proposals
    again = retried(study, first)
    assert frozen(study, again.number).system_attrs["failed_trial"] == first.number
    assert history.from_study(study, SPACE, top_k=1).proposals == once
    third = retried(study, again)
    assert history.from_study(study, SPACE, top_k=1).proposals == once
    # Unless it asks itself, as it has to when the first died before it was answered.
    records.mark_proposal_started(study, frozen(study, third.number))
    asks = history.from_study(study, SPACE, top_k=1).proposals
    assert [ask.trial_number for ask in asks] == [first.number, third.number]


# Mistakes.


def test_mistakes_are_told_with_the_stage_that_made_them(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    made = Mistakes.of(["food", "tool", "food"], ["tool", "tool", "food"], [("a", "b")] * 3)
    for text, mistakes in (("calm answer", made), ("quick topic", None)):
        trial = add(study, text, None, state=TrialState.RUNNING)
        if mistakes is not None:
            records.record_mistakes(trial, mistakes)
        study.tell(trial, 0.5)
    points = history.from_study(study, SPACE, top_k=5).points
    assert [point.mistakes for point in points] == [made, None]


def test_prompts_that_were_never_trained_have_no_mistakes() -> None:
    study = optuna.create_study()
    candidates = [candidate("quick topic", 0.2)]
    projected = [point(0, "calm label", 0.9, hard_loss=0.9)]
    trial = add(
        study,
        "calm answer",
        None,
        state=TrialState.RUNNING,
        candidates=candidates,
        points=projected,
    )
    records.record_mistakes(trial, Mistakes.of(["food"], ["tool"]))
    study.tell(trial, 0.5)
    points = history.from_study(study, SPACE, top_k=5).points
    assert [point.kind for point in points] == ["stage", "candidate", "projection"]
    assert [point.mistakes is None for point in points] == [False, True, True]
