from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.samplers import BaseSampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import refining
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import ZerothOrderStage

from .tiny import AlwaysPruner
from .tiny import make_objective
from .tiny import make_space
from .tiny import TASK_MODELS
from .tiny import tiny_stage


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


def trials_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states or None)


@pytest.fixture
def tuned(store: Store) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(make_objective(store=store), n_trials=2)
    return study


@each_model
def test_refining_goes_on_where_the_best_stage_ended(
    model_name: str, study: optuna.Study, store: Store
) -> None:
    objective = make_objective(model_name, store=store)
    study.optimize(objective, n_trials=3)
    best = study.best_trial
    refined = objective.refine(study, n_steps=8)
    assert refined.number == 3
    assert refined.state == TrialState.COMPLETE
    assert refined.params == best.params
    assert refined.distributions == best.distributions
    assert refined.user_attrs["origin"] == "refine"
    assert refined.user_attrs["refined_from"] == best.number
    assert refined.user_attrs["prompt"] == best.user_attrs["prompt"]
    assert refined.user_attrs["stage_steps"] == 8
    # Another process can tell whether this one died of it.
    workers = [records.load(trial, "worker", dict[str, Any]) for trial in (best, refined)]
    assert workers[0] == workers[1] is not None
    trajectory = load_trajectory(refined)
    assert trajectory is not None
    assert trajectory.points[0].loss == best.value
    assert refined.value is not None
    assert best.value is not None
    assert refined.value <= best.value == study.trials[best.number].value
    assert study.trials[3].value == refined.value
    trained = load_soft_prompt(study, trial_number=3, artifact_store=store)
    assert trained.facts.text == best.user_attrs["prompt"]


@each_model
def test_refining_can_find_a_lower_loss_and_be_repeated(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(model_name, store=store)
    objective.space.enqueue(study, "new old over")
    study.optimize(objective, n_trials=1)
    values = [study.best_value]
    for _ in range(2):
        values.append(objective.refine(study, n_steps=20).value or math.nan)
    assert values[2] <= values[1] < values[0]
    assert study.trials[2].user_attrs["refined_from"] == 1


def test_refining_by_no_steps_is_the_best_again(tuned: optuna.Study, store: Store) -> None:
    refined = make_objective(store=store).refine(tuned, n_steps=0)
    assert refined.value == tuned.best_value
    one, two = (
        load_soft_prompt(tuned, trial_number=number, artifact_store=store)
        for number in (refined.user_attrs["refined_from"], refined.number)
    )
    assert one.prompt.words().equal(two.prompt.words())


def stage_with_lr(trial: BaseTrial) -> GradientStage:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    return GradientStage(n_steps=2, lr=lr, eval_every=2)


def test_refining_uses_the_hyperparameters_of_the_best(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(store=store, make_stage=stage_with_lr)
    study.optimize(objective, n_trials=2)
    refined = objective.refine(study, n_steps=1)
    assert refined.params == study.trials[refined.user_attrs["refined_from"]].params
    assert "lr" in refined.params


# When it does not help.


@each_model
@pytest.mark.parametrize("patience", [1, 3, None])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_refining_ends_after_so_many_evaluations_that_are_no_better(
    metric: str, patience: int | None, model_name: str, store: Store
) -> None:
    """It is a complete stage then, of its best evaluation, with a place in the ensemble."""
    objective = make_objective(model_name, store=store, metric=metric)
    study = optuna.create_study(
        direction=objective.direction, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(objective, n_trials=2)
    seen: list[Evaluation] = []
    stage = tiny_stage(lr=30.0, head_lr=30.0, eval_every=1)
    wild = make_objective(
        model_name,
        store=store,
        metric=metric,
        stage=stage,
        observe=lambda _, e: seen.append(e),
    )
    refined = wild.refine(study, n_steps=12, patience=patience)
    ranks = [objective.metric.rank(e.value, e.loss) for e in seen]
    is_better = [rank < min(ranks[:i]) for i, rank in enumerate(ranks) if i]
    ends = [i for i in range(12 + 1) if patience and not any(is_better[:i][-patience:])]
    end = min((i for i in ends if i >= (patience or 0)), default=12)
    assert len(seen) == end + 1
    assert refined.state == TrialState.COMPLETE
    assert refined.user_attrs["stage_steps"] == end
    assert (refined.value, refined.user_attrs["loss"]) == min(
        ((e.value, e.loss) for e in seen), key=lambda pair: objective.metric.rank(*pair)
    )
    ensemble = records.load_ensemble(refined)
    assert ensemble is not None
    assert ensemble.n_members == 2


def test_refining_is_patient_for_three_evaluations(tuned: optuna.Study, store: Store) -> None:
    wild = make_objective(store=store, stage=tiny_stage(lr=1e3, eval_every=2))
    refined = wild.refine(tuned, n_steps=300)
    assert refined.user_attrs["stage_steps"] == 6
    assert refining.told(tuned, refined) == (
        f"Refining stage {refined.user_attrs['refined_from']} did not help, stopped after 6 of "
        "300 steps."
    )


def test_the_log_says_what_refining_came_to(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store)
    objective.space.enqueue(study, "new old over")
    study.optimize(objective, n_trials=1)
    optuna.logging.enable_propagation()
    before, after = study.best_value, objective.refine(study, n_steps=20).value
    told = f"Refined stage 0 from loss {before:.3f} to {after:.3f} in 20 of 20 steps."
    assert told in caplog.text


def test_a_stage_without_gradients_is_refined_by_queries(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store, stage=ZerothOrderStage(n_queries=4, eval_every=2))
    study.optimize(objective, n_trials=1)
    refined = objective.refine(study, n_steps=6)
    assert refined.user_attrs["stage_steps"] == 6
    assert refining.told(study, refined).endswith("of 6 queries.")


def test_a_patience_of_nothing_is_refused(tuned: optuna.Study, store: Store) -> None:
    with pytest.raises(ValueError, match="`patience` must be at least 1, got 0"):
        make_objective(store=store).refine(tuned, n_steps=5, patience=0)
    assert len(tuned.trials) == 2


# When it fails.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_refining_that_fails_leaves_no_running_trial(
    error: type[BaseException], tuned: optuna.Study, store: Store
) -> None:
    def fail(trial: BaseTrial, evaluation: Evaluation) -> None:
        if evaluation.step == 2:
            raise error

    with pytest.raises(error):
        make_objective(store=store, observe=fail).refine(tuned, n_steps=5)
    assert not trials_of(tuned, TrialState.RUNNING)
    [failed] = trials_of(tuned, TrialState.FAIL)
    assert failed.user_attrs["origin"] == "refine"


def test_refining_that_is_pruned_is_a_pruned_trial(tuned: optuna.Study, store: Store) -> None:
    tuned.pruner = AlwaysPruner()
    refined = make_objective(store=store).refine(tuned, n_steps=5)
    assert refined.state == TrialState.PRUNED
    assert refined.user_attrs["stage_steps"] == 2
    assert not trials_of(tuned, TrialState.RUNNING)


def test_refining_leaves_the_queue_alone(tuned: optuna.Study, store: Store) -> None:
    objective = make_objective(store=store)
    waiting = objective.space.enqueue(tuned, "wolf bread saw")
    refined = objective.refine(tuned, n_steps=1)
    assert refined.params != objective.space.to_params(waiting)
    [still] = trials_of(tuned, TrialState.WAITING)
    assert still.user_attrs == {"prompt": "wolf bread saw", "origin": "enqueued"}
    tuned.optimize(objective, n_trials=1)
    assert tuned.trials[still.number].params == objective.space.to_params(waiting)


def test_without_the_best_prompt_nothing_is_refined(tuned: optuna.Study, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    objective = make_objective(store=Store(str(elsewhere)))
    with pytest.raises(CheckpointError):
        objective.refine(tuned, n_steps=1)
    assert len(tuned.trials) == 2


# Run again.


class Killed(BaseException):
    """The process dies in the middle of a stage."""


SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
    "ours": lambda: LLMCatalystSampler(make_space(), n_startup_trials=1, seed=0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@each_model
def test_a_retried_refine_is_a_refine(
    model_name: str, sampler: str, study: optuna.Study, store: Store
) -> None:
    """As Optuna retries a trial whose worker died: from its parameters and attributes."""
    study.sampler = SAMPLERS[sampler]()
    study.optimize(make_objective(model_name, store=store), n_trials=2)
    best = study.best_trial

    def die(trial: BaseTrial, evaluation: Evaluation) -> None:
        if evaluation.step == 4:
            raise Killed

    with pytest.raises(Killed):
        make_objective(model_name, store=store, observe=die).refine(study, n_steps=8)
    [failed] = trials_of(study, TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, failed)
    # Made anew, as in the process that takes over.
    study.optimize(make_objective(model_name, store=store), n_trials=1)
    retried = study.trials[-1]
    assert retried.state == TrialState.COMPLETE
    assert retried.params == best.params
    assert retried.user_attrs["origin"] == "refine"
    assert retried.user_attrs["refined_from"] == best.number
    assert retried.user_attrs["stage_steps"] == 8
    assert retried.intermediate_values[0] == best.value
    unharmed = make_objective(model_name, store=store)
    again = optuna.create_study()
    again.add_trials(study.trials[:2])
    assert retried.value == unharmed.refine(again, n_steps=8).value
