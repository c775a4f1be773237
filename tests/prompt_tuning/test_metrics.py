"""What a study optimises, and that stages, studies and screens follow it."""

from __future__ import annotations

from collections.abc import Callable
import math
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState
import pytest
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score
from sklearn.metrics import log_loss
import torch
from torch import Tensor

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import Metric
from optuna_llm_catalyst.prompt_tuning import of_predictions
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.checkpoints import best_trial
from optuna_llm_catalyst.prompt_tuning.metrics import as_metric
from optuna_llm_catalyst.prompt_tuning.metrics import METRICS
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import make_dual
from .tiny import make_objective
from .tiny import TASK_MODELS
from .tiny import tiny_stage


Store = FileSystemArtifactStore
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
each_metric = pytest.mark.parametrize("metric", METRICS)


def confidence(labels: Tensor, log_probs: Tensor) -> float:
    """A measure of a user's: the mean probability of the right label."""
    return log_probs.exp().gather(1, labels[:, None]).mean().item()


def error_rate(labels: Tensor, predictions: Tensor) -> float:
    return (labels != predictions).double().mean().item()


OWN: dict[str, str | Metric | Callable[[Tensor, Tensor], float]] = {
    **{name: name for name in METRICS},
    "confidence": confidence,
    "error rate": of_predictions("error rate", error_rate, maximize=False),
}
each_own = pytest.mark.parametrize("metric", OWN.values(), ids=OWN.keys())


# Values, by scikit-learn.

ORACLES: dict[str, Callable[[Any, Any], float]] = {
    "loss": lambda labels, p: log_loss(labels, p, labels=range(p.shape[1])),
    "accuracy": lambda labels, p: accuracy_score(labels, p.argmax(-1)),
    "macro-f1": lambda labels, p: f1_score(labels, p.argmax(-1), average="macro"),
}


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 6))
@pytest.mark.parametrize("name", ORACLES)
def test_a_value_is_scikit_learns(name: str, seed: int, n: int, n_labels: int) -> None:
    """Whether all labels have examples or only some."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(rng.integers(0, n_labels, size=n_labels), size=n)
    probabilities = rng.dirichlet(np.ones(n_labels), size=n)
    log_probs = torch.from_numpy(np.log(probabilities))
    value = METRICS[name].value(torch.from_numpy(labels), log_probs)
    assert value == pytest.approx(ORACLES[name](labels, probabilities))


def test_every_metric_has_an_oracle() -> None:
    assert METRICS.keys() == ORACLES.keys()
    assert all(name == metric.name for name, metric in METRICS.items())


@each_metric
def test_what_is_not_a_number_has_no_value(metric: str) -> None:
    log_probs = torch.zeros(2, 3)
    log_probs[1, 2] = math.nan
    assert math.isnan(METRICS[metric].value(torch.tensor([0, 1]), log_probs))


def test_a_metric_of_predictions_takes_a_function_of_scikit_learn() -> None:
    metric = of_predictions("weighted-f1", lambda y, p: f1_score(y, p, average="weighted"))
    labels, log_probs = torch.tensor([0, 1, 1, 2]), torch.eye(3)[[0, 1, 2, 2]].log_softmax(-1)
    expected = f1_score([0, 1, 1, 2], [0, 1, 2, 2], average="weighted")
    assert metric.value(labels, log_probs) == expected
    assert metric.direction == "maximize"


@each_metric
def test_a_metric_can_be_pickled(metric: str) -> None:
    """As the sampler is, with the objective's scores as its screen."""
    labels, log_probs = torch.tensor([0, 1]), torch.eye(3)[:2].log_softmax(-1)
    again = pickle.loads(pickle.dumps(METRICS[metric]))
    assert again.value(labels, log_probs) == METRICS[metric].value(labels, log_probs)


RANKED = {
    "loss": [(0.1, 0.1), (0.2, 0.2), (math.inf, math.inf), (math.nan, math.nan)],
    "accuracy": [(0.9, 3.0), (0.8, 0.1), (0.8, 0.2), (0.8, math.inf), (math.nan, math.nan)],
}


@pytest.mark.parametrize(("name", "pairs"), RANKED.items(), ids=RANKED.keys())
def test_equal_values_are_ranked_by_their_loss(
    name: str, pairs: list[tuple[float, float]]
) -> None:
    ranks = [METRICS[name].rank(*pair) for pair in pairs]
    assert ranks == sorted(ranks)
    assert len(set(ranks[:-1])) == len(ranks) - 1


# Names.


def test_a_measure_is_a_score_of_its_name() -> None:
    metric = as_metric(confidence)
    assert (metric.name, metric.direction) == ("confidence", "maximize")
    assert as_metric(metric) is metric


BAD = {
    "unknown": ("f1", "`metric` must be one of loss, accuracy, macro-f1, got 'f1'"),
    "without a name": (lambda labels, log_probs: 0.0, "`metric` must have a name"),
}


@pytest.mark.parametrize(("metric", "message"), BAD.values(), ids=BAD.keys())
def test_bad_metrics_are_refused(metric: Any, message: str, store: Store) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(store=store, metric=metric)


# Stages.


def study_of(objective: PromptTuningObjective) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(direction=objective.direction, sampler=sampler)


@each_own
@each_model
@pytest.mark.parametrize("lr", [0.03, 3.0])
def test_a_stage_is_its_best_evaluation_by_the_metric(
    lr: float, model_name: str, metric: Any, store: Store
) -> None:
    """Its value, accuracy, words and prompt; and what is reported never gets worse."""
    seen: list[Evaluation] = []
    stage = tiny_stage(n_steps=9, lr=lr, eval_every=1)
    objective = make_objective(
        model_name, store=store, stage=stage, metric=metric, observe=lambda _, e: seen.append(e)
    )
    study = study_of(objective)
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    sign = -1 if objective.metric.maximize else 1
    best = min(seen, key=lambda e: (sign * e.value, e.loss))
    assert trial.value == best.value
    assert (trial.user_attrs["accuracy"], trial.user_attrs["loss"]) == (best.accuracy, best.loss)
    so_far = [min(sign * e.value for e in seen[: i + 1]) for i in range(len(seen))]
    assert [sign * value for value in trial.intermediate_values.values()] == so_far
    kept = load_soft_prompt(study, artifact_store=store).prompt
    assert all(kept.tensors[name].equal(tensor) for name, tensor in best.prompt.tensors.items())


def test_metrics_disagree_on_the_best_evaluation(store: Store) -> None:
    """Somewhere; else the test above says little."""

    def loss_of_best(metric: str, lr: float) -> float:
        stage = tiny_stage(n_steps=9, lr=lr, eval_every=1)
        objective = make_objective("sequence", store=store, stage=stage, metric=metric)
        study = study_of(objective)
        study.optimize(objective, n_trials=1)
        return float(study.trials[0].user_attrs["loss"])

    assert any(
        loss_of_best("loss", lr) < loss_of_best("accuracy", lr) for lr in (0.3, 0.5, 1.0, 2.0, 3.0)
    )


@each_metric
def test_a_stage_that_starts_with_no_number_fails(metric: str, store: Store) -> None:
    model = make_dual()
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight.fill_(math.nan)
    objective = make_objective(store=store, model=model, metric=metric, n_checked_swaps=0)
    study = study_of(objective)
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


@each_own
@each_model
def test_a_score_is_the_first_value_of_a_stage_from_there(
    model_name: str, metric: Any, store: Store
) -> None:
    objective = make_objective(model_name, store=store, metric=metric)
    study = study_of(objective)
    texts = ("people write this", "wolf bread saw", "new old over")
    prompts = [objective.space.enqueue(study, text) for text in texts]
    study.optimize(objective, n_trials=3)
    first = [trial.intermediate_values[0] for trial in study.trials]
    assert objective.score(prompts) == pytest.approx(first, abs=1e-3)


@each_own
def test_a_score_in_the_ensemble_is_what_its_record_will_say(metric: Any, store: Store) -> None:
    """Of a prompt that is not trained."""
    objective = make_objective(store=store, metric=metric, stage=tiny_stage(n_steps=0))
    study = study_of(objective)
    study.optimize(objective, n_trials=2)
    prompt = objective.space.enqueue(study, "wolf bread saw")
    [score] = objective.score_in_ensemble([prompt], study)
    study.optimize(objective, n_trials=1)
    ensemble = records.load_ensemble(study.trials[2])
    assert ensemble is not None
    assert ensemble.value == pytest.approx(score, abs=1e-6)


@each_own
def test_a_test_score_has_a_value(metric: Any, store: Store) -> None:
    objective = make_objective(store=store, metric=metric)
    study = study_of(objective)
    study.optimize(objective, n_trials=1)
    score = objective.test(load_soft_prompt(study, artifact_store=store))
    expected = {"loss": score.loss, "accuracy": score.accuracy, "error rate": 1 - score.accuracy}
    name = objective.metric.name
    assert score.value == pytest.approx(expected.get(name, score.value))
    assert score.value != pytest.approx(study.best_value)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_text_prompts_are_those_of_the_best_values(metric: str, store: Store) -> None:
    objective = make_objective(
        store=store,
        metric=metric,
        n_text_prompts=2,
        text_stage=tiny_stage(batch_size=8),
        later_texts="turns",
    )
    study = study_of(objective)
    for value in (0.5, 0.6, 0.55):
        trial = study.ask()
        objective(trial)
        study.tell(trial, value)
    study.optimize(objective, n_trials=2)
    found = [records.load(trial, "stage", StageRecord) for trial in study.trials]
    assert [record and record.text_prompt for record in found] == [
        *[0, 1, None],
        *([1, 0] if metric == "accuracy" else [0, 1]),
    ]


# Studies.


def test_the_default_is_the_loss(store: Store) -> None:
    objective = make_objective(store=store)
    assert (objective.metric.name, objective.direction) == ("loss", "minimize")


@pytest.mark.parametrize(
    ("metric", "directions"),
    [
        ("loss", ["maximize"]),
        ("accuracy", ["minimize"]),
        ("accuracy", ["maximize", "maximize"]),
    ],
)
def test_a_study_of_another_direction_is_refused(
    metric: str, directions: list[Any], store: Store
) -> None:
    objective = make_objective(store=store, metric=metric)
    study = optuna.create_study(directions=directions)
    with pytest.raises(ValueError, match=f"direction='{objective.direction}'"):
        study.optimize(objective, n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_a_study_of_another_metric_is_refused(store: Store) -> None:
    accuracy = make_objective(store=store, metric="accuracy")
    study = study_of(accuracy)
    study.optimize(accuracy, n_trials=1)
    with pytest.raises(StudyMismatchError, match="Trial 0 was valued by accuracy, .* by macro-f1"):
        study.optimize(make_objective(store=store, metric="macro-f1"), n_trials=1)


def test_equal_stages_are_chosen_by_their_loss(store: Store) -> None:
    """Few validation examples give few accuracies."""
    objective = make_objective(store=store, metric="accuracy")
    study = study_of(objective)
    for value, loss in ((0.9, 0.6), (0.9, 0.4), (0.9, 0.5), (0.8, 0.1)):
        trial = study.ask()
        objective(trial)
        trial.set_user_attr("loss", loss)
        study.tell(trial, value)
    assert best_trial(study).number == 1
    assert report.chosen(report.stage_rows(study)) == report.stage_row(study, 1)
    loaded = load_soft_prompt(study, artifact_store=store)
    assert loaded.facts.text == study.trials[1].user_attrs["prompt"]
    assert objective.refine(study, n_steps=0).user_attrs["refined_from"] == 1


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
def test_the_sampler_starts_from_the_candidate_of_the_highest_score(
    metric: str, store: Store
) -> None:
    objective = make_objective(store=store, metric=metric, stage=tiny_stage(n_steps=2))
    study = study_of(objective)
    study.sampler = LLMCatalystSampler(
        objective.space, screen=objective.score, n_startup_trials=1, n_candidates=6, seed=0
    )
    study.optimize(objective, n_trials=3)
    for trial in study.trials[1:]:
        proposal = records.load(trial, "proposal", dict)
        assert proposal is not None
        scores = [candidate["score"] for candidate in proposal["candidates"]]
        assert trial.intermediate_values[0] == pytest.approx(max(scores), abs=1e-6)
