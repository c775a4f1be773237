"""Which model a study, its stages and its prompts belong to, and the test score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import math
import re

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState
import pytest
import torch

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst import records
from optuna_llm_catalyst import StudyMismatchError
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.stage_records import settings_of
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_encoder
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_task
from .tiny import TASK_MODELS
from .tiny import tiny_stage


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


def make_other(model_name: str) -> TaskModel:
    """Another model of the same name: one number of its weights differs."""
    encoder, tokenizer = make_encoder()
    with torch.no_grad():
        next(p for n, p in encoder.named_parameters() if "layer.1" in n).view(-1)[7] += 0.5
    pretrained = Pretrained.of(encoder, tokenizer, name="bert")
    if model_name == "dual":
        return DualEncoderClassifier(pretrained, LABELS)
    return SequenceClassifier(pretrained, LABELS, max_virtual_tokens=8)


@pytest.fixture
def study(store: Store) -> optuna.Study:
    """One complete stage of a DualEncoderClassifier."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(make_objective(store=store), n_trials=1)
    return study


# The model.


@each_model
def test_a_model_has_a_name_and_a_fingerprint(model_name: str) -> None:
    encoder, tokenizer = make_encoder()
    model = type(TASK_MODELS[model_name]())(Pretrained.of(encoder, tokenizer), LABELS)
    assert model.name == "BertModel"
    assert re.fullmatch(type(model).__name__ + r":[0-9a-f]{16}", model.fingerprint)
    assert model.fingerprint == TASK_MODELS[model_name]().fingerprint
    assert model.fingerprint != make_other(model_name).fingerprint


@pytest.mark.parametrize("ends", ["COMPLETE", "PRUNED", "FAIL"])
@each_model
def test_a_study_of_another_model_is_refused(model_name: str, ends: str, store: Store) -> None:
    """Before anything is trained, however the study's own stage ended."""

    def end(trial: optuna.trial.BaseTrial, evaluation: Evaluation) -> None:
        if ends == "PRUNED":
            raise optuna.TrialPruned
        if ends == "FAIL":
            raise RuntimeError

    study = optuna.create_study()
    first = make_objective(model_name, store=store, observe=end)
    study.optimize(first, n_trials=1, catch=RuntimeError)
    assert study.trials[0].state.name == ends
    model = make_other(model_name)
    other = make_objective(store=store, model=model)
    with (
        model.metered() as passes,
        pytest.raises(StudyMismatchError, match="Trial 0 ran on the model 'bert'") as raised,
    ):
        study.optimize(other, n_trials=1)
    assert passes.forward == 0
    assert study.trials[1].state == TrialState.FAIL
    for fingerprint in (model.fingerprint, TASK_MODELS[model_name]().fingerprint):
        assert fingerprint in str(raised.value)
    # The refused trial is no stage of the other model: the study goes on with its own.
    study.optimize(make_objective(model_name, store=store), n_trials=1)
    assert study.trials[2].state == TrialState.COMPLETE


def test_a_prompt_of_another_model_is_refused(study: optuna.Study, store: Store) -> None:
    trained = load_soft_prompt(study, artifact_store=store)
    model = make_other("dual")
    other = make_objective(store=store, model=model)
    for use in (lambda: other.test(trained), lambda: other.refine(study, n_steps=1)):
        with pytest.raises(CheckpointError, match="trained on 'bert'") as raised:
            use()
        assert trained.facts.fingerprint in str(raised.value)
        assert model.fingerprint in str(raised.value)
    assert len(study.trials) == 1


def test_a_prompt_of_another_task_model_is_refused(study: optuna.Study, store: Store) -> None:
    """A prompt before class names is none before texts, though the encoder is the same."""
    trained = load_soft_prompt(study, artifact_store=store)
    other = make_objective("sequence", store=store)
    for use in (lambda: other.test(trained), lambda: other.refine(study, n_steps=1)):
        with pytest.raises(CheckpointError, match="DualEncoder.*use the model and the task"):
            use()
    assert len(study.trials) == 1


def test_a_study_of_another_task_model_is_refused(study: optuna.Study, store: Store) -> None:
    with pytest.raises(StudyMismatchError, match="DualEncoder.*SequenceClassifier"):
        study.optimize(make_objective("sequence", store=store), n_trials=1)


# The record of a stage.


@each_model
def test_a_trial_says_how_its_stage_ran(model_name: str, store: Store) -> None:
    stage = tiny_stage(n_steps=3, lr=0.01)
    objective = make_objective(model_name, store=store, stage=stage)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    record = records.load(study.trials[0], "stage", StageRecord)
    assert record is not None
    model = TASK_MODELS[model_name]()
    assert (record.model.name, record.model.fingerprint) == ("bert", model.fingerprint)
    assert record.settings == settings_of(stage, model)
    expected = {"stage": "GradientStage", "n_steps": 3, "lr": 0.01, "eval_every": 2}
    assert record.settings.items() >= expected.items()
    assert record.settings.get("temperature") == (0.05 if model_name == "dual" else None)


@pytest.mark.parametrize(
    "options",
    [
        {"stage": tiny_stage(lr=0.02)},
        {"stage": tiny_stage(eval_every=1)},
        {"model": make_dual(temperature=0.1)},
    ],
)
def test_other_settings_show_in_the_record(
    options: dict[str, object], study: optuna.Study, store: Store
) -> None:
    objective = make_objective(store=store, **options)
    study.optimize(objective, n_trials=1)
    one, two = (records.load(trial, "stage", StageRecord) for trial in study.trials)
    assert one is not None
    assert two is not None
    assert one.model == two.model
    assert len(one.settings.items() ^ two.settings.items()) == 2


def test_a_trial_of_its_own_stage_says_which(store: Store) -> None:
    objective = make_objective(
        store=store, make_stage=lambda trial: tiny_stage(lr=trial.suggest_float("lr", 0.01, 0.1))
    )
    study = optuna.create_study()
    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        record = records.load(trial, "stage", StageRecord)
        assert record is not None
        assert record.settings["lr"] == trial.params["lr"]


def test_a_refined_stage_says_its_own_budget(study: optuna.Study, store: Store) -> None:
    refined = make_objective(store=store).refine(study, n_steps=4)
    record = records.load(refined, "stage", StageRecord)
    assert record is not None
    assert record.settings["n_steps"] == 4


# The test split.


@each_model
def test_a_test_score_is_that_of_the_test_split(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    task = make_task(test=make_examples(7, seed=8))
    objective = make_objective(model_name, store=store, task=task)
    study.optimize(objective, n_trials=2)
    trained = load_soft_prompt(study, artifact_store=store)
    score = objective.test(trained)
    model = TASK_MODELS[model_name]()
    expected = evaluate(model, trained.prompt, model.encode(task.test))
    assert (score.loss,) == pytest.approx(expected.loss)
    assert (score.accuracy,) == pytest.approx(expected.accuracy)
    assert score.n_examples == 7


def test_without_a_test_split_there_is_no_test_score(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store, task=make_task(test=()))
    study.optimize(objective, n_trials=1)
    with pytest.raises(ValueError, match=r"no test examples: add test\.jsonl"):
        objective.test(load_soft_prompt(study, artifact_store=store))


def test_a_prompt_for_other_labels_has_no_score(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store)
    study.optimize(objective, n_trials=1)
    trained = load_soft_prompt(study, artifact_store=store)
    with pytest.raises(CheckpointError, match="for the labels food, tool, the task has"):
        objective.test(replace(trained, facts=replace(trained.facts, labels=("food", "tool"))))


@pytest.mark.parametrize("option", [{"max_length": 6}, {"max_virtual_tokens": 4}])
def test_where_texts_are_cut_shows_in_the_record(option: dict[str, int]) -> None:
    one, two = (
        settings_of(tiny_stage(), TASK_MODELS["sequence"](**options)) for options in ({}, option)
    )
    assert dict(two.items() - one.items()) == option


@dataclass(frozen=True)
class Scheduled(GradientStage):
    """A stage of somebody else with a field that is no JSON."""

    warmup: Callable[[float], float] = math.sqrt


def test_a_stage_may_have_fields_that_are_no_json(store: Store) -> None:
    study = optuna.create_study()
    study.optimize(make_objective(store=store, stage=Scheduled(n_steps=1)), n_trials=1)
    record = records.load(study.trials[0], "stage", StageRecord)
    assert record is not None
    assert "sqrt" in str(record.settings)
