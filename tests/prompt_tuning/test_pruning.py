"""Pruners see the lowest loss so far by optimiser step, and nothing of an untrained prompt."""

from __future__ import annotations

import math

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import AlwaysPruner
from .tiny import make_objective
from .tiny import TASK_MODELS
from .tiny import tiny_stage


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


def test_the_default_pruner_prunes_no_untrained_prompt(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert isinstance(study.pruner, optuna.pruners.MedianPruner)
    study.optimize(make_objective(store=store, n_checked_swaps=0), n_trials=30)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert 1 <= len(pruned) <= 29  # Else nothing is tested.
    assert all(trial.user_attrs["stage_steps"] >= 2 for trial in pruned)
    assert all(trial.last_step == trial.user_attrs["stage_steps"] for trial in study.trials)


@each_model
def test_a_pruner_is_not_asked_before_training(model_name: str, store: Store) -> None:
    pruner = AlwaysPruner(first=100)
    study = optuna.create_study(pruner=pruner)
    study.optimize(make_objective(model_name, store=store), n_trials=2)
    assert pruner.asked == [2, 4, 5] * 2


@each_model
@pytest.mark.parametrize("lr", [0.03, 300.0, 3e38])
def test_intermediate_values_are_the_lowest_so_far(
    lr: float, model_name: str, study: optuna.Study, store: Store
) -> None:
    """By optimiser step, whether training helps, harms or diverges."""
    losses: dict[int, float] = {}
    objective = make_objective(
        model_name,
        store=store,
        stage=tiny_stage(n_steps=9, lr=lr, optimizer="sgd", eval_every=3),
        observe=lambda _, e: losses.__setitem__(e.step, e.loss),
    )
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert list(trial.intermediate_values) == list(losses)
    values = list(trial.intermediate_values.values())
    assert values == sorted(values, reverse=True)
    assert values[-1] == trial.value == min(x for x in losses.values() if not math.isnan(x))


@each_model
@pytest.mark.parametrize("lr", [0.03, 300.0, 3e38])
def test_a_pruned_stage_is_its_best_evaluation(
    lr: float, model_name: str, study: optuna.Study, store: Store
) -> None:
    """Its value, accuracy, words and artifact, whether the best came last or first."""
    seen: list[Evaluation] = []
    study.pruner = AlwaysPruner(first=3)
    objective = make_objective(
        model_name,
        store=store,
        stage=tiny_stage(n_steps=9, lr=lr, optimizer="sgd", eval_every=3),
        observe=lambda _, e: seen.append(e),
    )
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [e.step for e in seen] == [0, 3]
    assert trial.user_attrs["stage_steps"] == 3
    best = seen[1] if lr == 0.03 else seen[0]
    assert trial.value == best.loss == min(e.loss for e in seen if not math.isnan(e.loss))
    assert trial.user_attrs["accuracy"] == best.accuracy
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert [point.step for point in trajectory.points] == [0, 3]
    [point] = [point for point in trajectory.points if point.step == best.step]
    assert trial.user_attrs["tuned_prompt"] == point.text
    kept = load_soft_prompt(study, trial_number=0, artifact_store=store).prompt
    for name, tensor in best.prompt.tensors.items():
        assert kept.tensors[name].equal(tensor)


def test_a_stage_that_trains_a_text_prompt_is_not_pruned(store: Store) -> None:
    """Later stages rest on it, and it is trained in another way than others."""
    study = optuna.create_study(pruner=AlwaysPruner())
    objective = make_objective(store=store, n_text_prompts=1, text_stage=tiny_stage(batch_size=8))
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert study.trials[0].user_attrs["stage_steps"] == 5
