from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
import torch

import optuna_llm_catalyst
from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.models import counted_passes
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import embed
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import StageResult

from .tiny import make_dual
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_space
from .tiny import make_task
from .tiny import TASK_MODELS


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


class AlwaysPruner(BasePruner):
    """Prunes from a given evaluation on."""

    def __init__(self, first: int = 0) -> None:
        self._first = first

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        last = trial.last_step
        return last is not None and last >= self._first


def trials_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states or None)


# The contract on a trial.


@each_model
def test_a_trial_carries_all_that_the_rest_of_the_package_reads(
    model_name: str, study: optuna.Study, store: Store
) -> None:
    seen: list[Evaluation] = []
    objective = make_objective(model_name, store=store, observe=lambda _, e: seen.append(e))
    prompt = objective.space.enqueue(study, "people write this")
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.params == objective.space.to_params(prompt)
    best = min(seen, key=lambda evaluation: evaluation.loss)
    assert trial.value == best.loss
    assert trial.intermediate_values == {e.index: e.loss for e in seen}
    assert list(trial.intermediate_values) == [0, 1, 2, 3]  # at the steps 0, 2, 4, 5
    attrs = trial.user_attrs
    assert attrs["prompt"] == "people write this"
    assert attrs["origin"] == "enqueued"
    assert attrs["accuracy"] == best.accuracy
    assert attrs["stage_steps"] == 5
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert [(p.step, p.loss, p.accuracy) for p in trajectory.points] == [
        (e.step, e.loss, e.accuracy) for e in seen
    ]
    assert trajectory.points[0].text == "people write this"
    assert all(p.hard_loss is not None for p in trajectory.points)
    assert trajectory.best is not None
    assert attrs["tuned_prompt"] == trajectory.best.text
    artifact = Path(store._base_path) / attrs["soft_prompt_artifact"]
    assert artifact.is_file()
    assert all(isinstance(value, str | int | float) for value in attrs.values())


@each_model
def test_every_pass_of_a_trial_is_counted_on_it(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    model = TASK_MODELS[model_name]()
    objective = make_objective(store=store, model=model)
    with counted_passes(model) as passes:
        study.optimize(objective, n_trials=1)
    attrs = study.trials[0].user_attrs
    assert attrs["forward_passes"] == passes.forward
    assert attrs["backward_passes"] == passes.backward
    assert attrs["forward_sequences"] == passes.sequences
    assert passes.backward >= 5


@each_model
def test_the_passes_of_screening_are_counted_on_the_trial_that_is_screened_for(
    model_name: str, store: Store
) -> None:
    model = TASK_MODELS[model_name]()
    objective = make_objective(store=store, model=model)
    sampler = LLMCatalystSampler(
        objective.space, screen=objective.score, n_startup_trials=1, n_candidates=3, seed=0
    )
    study = optuna.create_study(sampler=sampler)
    with counted_passes(model) as passes:
        study.optimize(objective, n_trials=2)
    attrs = [trial.user_attrs for trial in study.trials]
    assert attrs[1]["origin"] == "mutation"
    for key in ("forward", "backward"):
        assert sum(a[f"{key}_passes"] for a in attrs) == getattr(passes, key)
    assert sum(a["forward_sequences"] for a in attrs) == passes.sequences


@each_model
def test_training_helps_and_the_trained_prompt_is_kept(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(model_name, store=store)
    objective.space.enqueue(study, "new old over")
    study.optimize(objective, n_trials=1)
    trial = study.best_trial
    assert trial.value < trial.intermediate_values[0]
    trained = load_soft_prompt(study, artifact_store=store)
    start = embed([trained.token_ids], TASK_MODELS[model_name]().word_embeddings)[0]
    assert not torch.equal(trained.embeddings, start)


@each_model
@pytest.mark.parametrize("kind", ["fixed", "frozen"])
def test_trials_that_live_in_no_study_have_the_same_value_and_attributes(
    kind: str, model_name: str, store: Store
) -> None:
    objective = make_objective(model_name, store=store)
    prompt = objective.space.from_text("people write this")
    params = objective.space.to_params(prompt)
    trial: Any = optuna.trial.FixedTrial(params)
    if kind == "frozen":
        trial = optuna.trial.create_trial(
            value=0.0, params=params, distributions=objective.space.search_space
        )
    value = objective(trial)
    study = optuna.create_study()
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    assert value == study.best_value
    studys_own = {"soft_prompt_artifact": study.best_trial.user_attrs["soft_prompt_artifact"]}
    assert trial.user_attrs | studys_own == study.best_trial.user_attrs
    assert load_trajectory(trial) == load_trajectory(study.best_trial)


@each_model
def test_the_same_prompt_has_the_same_value_whenever_it_is_tried(
    model_name: str, store: Store
) -> None:
    study = optuna.create_study()
    objective = make_objective(model_name, store=store)
    for text in ("people write this", "wolf bread saw", "people write this"):
        objective.space.enqueue(study, text)
    study.optimize(objective, n_trials=3)
    one, between, two = study.trials
    assert one.value == two.value != between.value
    assert one.intermediate_values == two.intermediate_values
    assert load_trajectory(one) == load_trajectory(two)


def test_tokens_that_are_no_words_are_named_by_themselves_at_the_start(store: Store) -> None:
    objective = make_objective(store=store)
    encode = objective.space.tokenizer.convert_tokens_to_ids
    token_ids = (encode("[CLS]"), encode("##ing"), encode("wolf"))
    study = optuna.create_study()
    study.enqueue_trial(dict(zip(objective.space.param_names, token_ids, strict=True)))
    study.optimize(objective, n_trials=1)
    trajectory = load_trajectory(study.trials[0])
    assert trajectory is not None
    assert trajectory.points[0].token_ids == token_ids


@each_model
def test_a_stage_that_diverges_has_the_value_of_its_restart(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    stage = GradientStage(n_steps=6, lr=3e38, optimizer="sgd", eval_every=3)
    objective = make_objective(model_name, store=store, stage=stage)
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert trial.value == trajectory.points[0].loss
    assert math.isnan(trajectory.points[-1].loss)
    assert trial.user_attrs["stage_steps"] == 3
    trained = load_soft_prompt(study, artifact_store=store)
    assert trained.embeddings.isfinite().all()


# Mistakes.


def make_told_task() -> Task:
    """A task every text of which has a word that nothing else has."""
    splits = {"train": (24, 1), "validation": (18, 9), "test": (6, 3)}
    return make_task(
        **{
            name: tuple(
                replace(example, text=f"{example.text} secret{name}{i}x")
                for i, example in enumerate(make_examples(n, seed=seed))
            )
            for name, (n, seed) in splits.items()
        }
    )


def stored(study: optuna.Study) -> str:
    """All that a study's storage knows of its trials."""
    return repr([(t.params, t.user_attrs, t.system_attrs) for t in study.get_trials()])


@each_model
@pytest.mark.parametrize("shared", [False, True])
def test_a_trial_tells_the_mistakes_of_its_trained_prompt(
    shared: bool, model_name: str, study: optuna.Study, store: Store
) -> None:
    task = make_told_task()
    objective = make_objective(model_name, store=store, task=task, share_examples=shared)
    study.optimize(objective, n_trials=2)
    model = TASK_MODELS[model_name]()
    split = model.encode(task.validation)
    for trial in study.trials:
        trained = load_soft_prompt(study, trial_number=trial.number, artifact_store=store)
        with torch.no_grad():
            logits = model.logits(trained.embeddings[None], trained.head, split)[0]
        pairs = [
            (task.labels[example.label], task.labels[int(row.argmax())])
            for example, row in zip(task.validation, logits, strict=True)
        ]
        errors = [(*pair, e.text) for pair, e in zip(pairs, task.validation, strict=True)]
        errors = [error for error in errors if error[0] != error[1]]
        mistakes = records.load_mistakes(trial)
        assert mistakes is not None
        assert {(c.label, c.predicted): c.count for c in mistakes.confusions} == Counter(
            error[:2] for error in errors
        )
        assert errors  # Else there is nothing to compare.
        assert all(c.total == 6 for c in mistakes.confusions)  # 18 examples of three labels.
        n_errors = sum(c.count for c in mistakes.confusions)
        assert trial.user_attrs["accuracy"] == pytest.approx(1 - n_errors / 18)
        assert len(mistakes.texts) == (min(5, n_errors) if shared else 0)
        assert {(t.label, t.predicted, t.text) for t in mistakes.texts} <= set(errors)


@each_model
@pytest.mark.parametrize("shared", [False, True])
def test_no_text_is_in_the_storage_unless_examples_are_shared(
    shared: bool, model_name: str, storage: BaseStorage, store: Store, tmp_path: Path
) -> None:
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=storage, sampler=sampler)
    objective = make_objective(
        model_name, store=store, task=make_told_task(), share_examples=shared
    )
    study.optimize(objective, n_trials=2)
    objective.refine(study, n_steps=2)
    assert ("secretvalidation" in stored(study)) is shared
    assert "secrettrain" not in stored(study)
    assert "secrettest" not in stored(study)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (b"secretvalidation" in kept) is (shared and isinstance(storage, RDBStorage))
    assert b"secrettrain" not in kept
    assert b"secrettest" not in kept


class ReticentStage(GradientStage):
    """A stage of a third party that does not tell its predictions."""

    def run(self, *args: Any, observe: Any = None, **options: Any) -> StageResult:
        seen = observe and (lambda evaluation: observe(replace(evaluation, predictions=None)))
        result = super().run(*args, observe=seen, **options)
        return replace(result, best=replace(result.best, predictions=None))


@each_model
def test_mistakes_cost_no_pass(model_name: str, store: Store) -> None:
    n_passes, mistakes, values = [], [], []
    for stage_class in (GradientStage, ReticentStage):
        for shared in (False, True):
            stage = stage_class(n_steps=5, lr=0.03, head_lr=0.01, eval_every=2)
            model = TASK_MODELS[model_name]()
            objective = make_objective(
                store=store, model=model, stage=stage, share_examples=shared
            )
            trial = optuna.trial.FixedTrial(
                objective.space.to_params(objective.space.from_text("people write this"))
            )
            with counted_passes(model) as passes:
                values.append(objective(trial))
            n_passes.append((passes.forward, passes.backward, passes.sequences))
            mistakes.append(records.load_mistakes(trial))
    assert len(set(n_passes)) == len(set(values)) == 1
    assert [row is None for row in mistakes] == [False, False, True, True]
    assert mistakes[0] == replace(mistakes[1] or Mistakes(), texts=())


def test_a_pruned_stage_and_a_refined_one_tell_their_mistakes_as_well(store: Store) -> None:
    study = optuna.create_study(pruner=AlwaysPruner(first=1))
    study.optimize(make_objective(store=store), n_trials=1)
    study.pruner = optuna.pruners.NopPruner()
    study.optimize(make_objective(store=store), n_trials=1)
    make_objective(store=store).refine(study, n_steps=4)
    for trial in study.trials:
        mistakes = records.load_mistakes(trial)
        assert mistakes is not None
        n_errors = sum(c.count for c in mistakes.confusions)
        assert trial.user_attrs["accuracy"] == pytest.approx(1 - n_errors / 18)
    assert [t.state.name for t in study.trials] == ["PRUNED", "COMPLETE", "COMPLETE"]


def test_the_mistakes_are_those_of_the_best_evaluation_and_not_of_the_last(store: Store) -> None:
    seen: list[Evaluation] = []
    stage = GradientStage(n_steps=6, lr=3e38, optimizer="sgd", eval_every=3)
    objective = make_objective(
        "sequence", store=store, stage=stage, observe=lambda _, e: seen.append(e)
    )
    trial = optuna.trial.FixedTrial(
        objective.space.to_params(objective.space.from_text("people write this"))
    )
    objective(trial)
    best = min(seen, key=lambda evaluation: evaluation.loss)
    assert best.predictions is not None
    assert seen[-1].predictions is not None
    assert not torch.equal(best.predictions, seen[-1].predictions)
    labels = [example.label for example in objective.task.validation]
    n_errors = sum(a != b for a, b in zip(best.predictions.tolist(), labels, strict=True))
    mistakes = records.load_mistakes(trial)
    assert mistakes is not None
    assert sum(c.count for c in mistakes.confusions) == n_errors


# Scores.


@each_model
def test_a_score_is_the_first_loss_of_a_stage_from_there(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(model_name, store=store)
    texts = ("people write this", "wolf bread saw", "new old over")
    prompts = [objective.space.enqueue(study, text) for text in texts]
    study.optimize(objective, n_trials=3)
    first = [trial.intermediate_values[0] for trial in study.trials]
    assert objective.score(prompts) == pytest.approx(first, abs=1e-3)
    assert [objective.score([prompt])[0] for prompt in prompts] == first
    assert len(set(first)) == 3


def test_a_score_is_independent_of_the_test_split(store: Store) -> None:
    one, two = (
        make_objective(store=store, task=make_task(test=make_examples(9, seed=seed)))
        for seed in (5, 6)
    )
    prompts = [one.space.from_text("people write this")]
    assert one.score(prompts) == two.score(prompts)


# Pruning.


@each_model
def test_a_pruned_stage_keeps_its_trajectory_and_its_prompt(
    model_name: str, storage: BaseStorage, store: Store
) -> None:
    study = optuna.create_study(storage=storage, pruner=AlwaysPruner(first=1))
    study.optimize(make_objective(model_name, store=store), n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 1]
    assert trial.user_attrs["stage_steps"] == 2
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert [point.step for point in trajectory.points] == [0, 2]
    trained = load_soft_prompt(study, trial_number=0, artifact_store=store)
    assert trained.embeddings.shape == (3, 32)


# Samplers.

SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
    "tpe": lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=2),
    "multivariate_tpe": lambda: optuna.samplers.TPESampler(
        seed=0, n_startup_trials=2, multivariate=True
    ),
    "ours": lambda: LLMCatalystSampler(make_space(), n_startup_trials=2, seed=0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_optuna_runs_on_the_objective(sampler: str, store: Store) -> None:
    study = optuna.create_study(sampler=SAMPLERS[sampler]())
    study.optimize(make_objective(store=store), n_trials=4)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4


def stage_with_lr(trial: BaseTrial) -> GradientStage:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    return GradientStage(n_steps=2, lr=lr, eval_every=2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stage_can_be_made_of_hyperparameters_that_the_trial_suggests(
    sampler: str, store: Store
) -> None:
    objective = make_objective(store=store, stage=stage_with_lr)
    study = optuna.create_study(sampler=SAMPLERS[sampler]())
    study.optimize(objective, n_trials=4)
    for trial in study.trials:
        fixed = make_objective(
            store=store, stage=GradientStage(n_steps=2, lr=trial.params["lr"], eval_every=2)
        )
        assert fixed(optuna.trial.FixedTrial(trial.params)) == trial.value
    assert len({trial.params["lr"] for trial in study.trials}) == 4


@each_model
def test_a_study_that_is_resumed_goes_on_as_if_it_had_not_stopped(
    model_name: str, sqlite: Callable[[], RDBStorage], store: Store
) -> None:
    def run(name: str, n_trials: int) -> optuna.Study:
        # All is made anew, as in a new process.
        stage = GradientStage(n_steps=2, lr=0.03, eval_every=2)
        objective = make_objective(model_name, store=store, stage=stage)
        sampler = LLMCatalystSampler(
            objective.space, screen=objective.score, n_startup_trials=2, seed=0
        )
        study = optuna.create_study(
            storage=sqlite(), study_name=name, sampler=sampler, load_if_exists=True
        )
        study.optimize(objective, n_trials=n_trials)
        return study

    straight = run("straight", 6)
    run("resumed", 3)
    resumed = run("resumed", 3)
    assert len(resumed.trials) == 6
    for one, two in zip(straight.trials, resumed.trials, strict=True):
        assert one.params == two.params
        assert one.value == two.value
        assert load_trajectory(one) == load_trajectory(two)
    origins = [trial.user_attrs["origin"] for trial in resumed.trials]
    assert origins == ["startup"] * 2 + ["mutation"] * 4


# What does not fit together.


def test_a_study_that_maximizes_is_refused(store: Store) -> None:
    maximizes = optuna.create_study(direction="maximize")
    with pytest.raises(ValueError, match="direction='minimize'"):
        maximizes.optimize(make_objective(store=store), n_trials=1)
    assert [trial.state for trial in maximizes.trials] == [TrialState.FAIL]


def test_a_task_of_other_labels_is_refused(store: Store) -> None:
    task = replace(make_task(), labels=("wild_animal", "tool", "food"))
    with pytest.raises(ValueError, match="`model` has the labels .* `task` has"):
        make_objective(store=store, task=task)


def test_a_task_without_validation_examples_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"no validation examples.*few_shot"):
        make_objective(store=store, task=make_task(validation=()))


def test_a_space_of_more_tokens_than_the_model_embeds_is_refused(store: Store) -> None:
    space = PromptSpace(make_space().tokenizer, 3, vocab_size=1000)
    with pytest.raises(ValueError, match="`space` has 1000 tokens, `model` embeds 75"):
        make_objective(store=store, space=space)


@each_model
def test_a_space_of_longer_prompts_than_the_model_has_room_for_is_refused(
    model_name: str, store: Store
) -> None:
    model = TASK_MODELS[model_name]()
    longest = model.max_virtual_tokens
    make_objective(store=store, model=model, length=longest)
    with pytest.raises(ValueError, match=f"{longest + 1} virtual tokens, .* room for {longest}"):
        make_objective(store=store, model=model, length=longest + 1)


# The test split.


@each_model
def test_a_test_score_is_the_trained_prompts_on_the_test_split(
    model_name: str, store: Store
) -> None:
    study = optuna.create_study()
    task = make_task(test=make_examples(7, seed=8))
    objective = make_objective(model_name, store=store, task=task)
    study.optimize(objective, n_trials=2)
    trained = load_soft_prompt(study, artifact_store=store)
    score = objective.test(trained)
    model = TASK_MODELS[model_name]()
    expected = evaluate(model, trained.embeddings[None], trained.head, model.encode(task.test))
    assert (score.loss,) == pytest.approx(expected.loss)
    assert (score.accuracy,) == pytest.approx(expected.accuracy)
    assert score.n_examples == 7


def test_without_a_test_split_there_is_no_test_score(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store, task=make_task(test=()))
    study.optimize(objective, n_trials=1)
    with pytest.raises(ValueError, match=r"no test examples: add test\.jsonl"):
        objective.test(load_soft_prompt(study, artifact_store=store))


def test_a_prompt_of_other_labels_or_another_width_has_no_test_score(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store)
    study.optimize(objective, n_trials=1)
    trained = load_soft_prompt(study, artifact_store=store)
    with pytest.raises(CheckpointError, match="for the labels food, tool, the task has"):
        objective.test(replace(trained, labels=("food", "tool")))
    with pytest.raises(CheckpointError, match="on 'bert' with embeddings of width 16, .* 32"):
        objective.test(replace(trained, embeddings=trained.embeddings[:, :16]))


def test_a_prompt_of_another_model_has_no_test_score(store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(store=store)
    study.optimize(objective, n_trials=1)
    trained = load_soft_prompt(study, artifact_store=store)
    with pytest.raises(CheckpointError, match="trained on 'other', this model is 'bert'"):
        objective.test(replace(trained, model_name="other"))


def test_no_prompts_have_no_scores(store: Store) -> None:
    assert make_objective(store=store).score([]) == []


@each_model
def test_the_loss_of_projected_words_is_the_score_they_have_as_candidates(
    model_name: str, store: Store
) -> None:
    objective = make_objective(model_name, store=store)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    trajectory = load_trajectory(study.best_trial)
    assert trajectory is not None
    prompts = [objective.space.from_token_ids(point.token_ids) for point in trajectory.points]
    for point, score in zip(trajectory.points, objective.score(prompts), strict=True):
        assert point.hard_loss == pytest.approx(score, abs=1e-3)


# The last stage.


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
    trajectory = load_trajectory(refined)
    assert trajectory is not None
    assert trajectory.points[0].loss == best.value
    assert refined.value is not None
    assert best.value is not None
    assert refined.value <= best.value == study.trials[best.number].value
    assert study.trials[3].value == refined.value
    assert (
        load_soft_prompt(study, trial_number=3, artifact_store=store).text
        == best.user_attrs["prompt"]
    )


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
    assert torch.equal(one.embeddings, two.embeddings)


def test_refining_uses_the_hyperparameters_of_the_best(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(store=store, stage=stage_with_lr)
    study.optimize(objective, n_trials=2)
    refined = objective.refine(study, n_steps=1)
    assert refined.params == study.trials[refined.user_attrs["refined_from"]].params
    assert "lr" in refined.params


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_refining_that_fails_leaves_no_running_trial(
    error: type[BaseException], tuned: optuna.Study, store: Store
) -> None:
    def fail(trial: BaseTrial, evaluation: Evaluation) -> None:
        if evaluation.index == 1:
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
    assert refined.user_attrs["stage_steps"] == 0
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


# The real model.


def test_a_stage_on_the_real_minilm_lowers_the_loss_of_the_demo(
    minilm: Pretrained, store: Store
) -> None:
    folder = Path(optuna_llm_catalyst.__file__).parent / "demo" / "customer_support"
    task = few_shot(load_task(folder), shots=4, seed=0)
    model = DualEncoderClassifier(minilm.encoder, minilm.tokenizer, task.labels)
    objective = PromptTuningObjective(
        model,
        task,
        PromptSpace(minilm.tokenizer, 4),
        stage=GradientStage(n_steps=6, eval_every=3),
        artifact_store=store,
        n_checked_swaps=2,
    )
    study = optuna.create_study()
    objective.space.enqueue(study, "message from customer about")
    study.optimize(objective, n_trials=1)
    trial = study.best_trial
    assert trial.user_attrs["prompt"] == "message from customer about"
    assert study.best_value < trial.intermediate_values[0] - 0.05
    assert trial.user_attrs["accuracy"] > 0.5
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert trajectory.points[0].text == "message from customer about"
    assert trajectory.points[-1].drift


def test_the_default_stage_is_gradient_descent(store: Store) -> None:
    model = make_dual()
    objective = PromptTuningObjective(model, make_task(), make_space(), artifact_store=store)
    trial = optuna.trial.FixedTrial(make_space().to_params(make_space().from_text("wolf")))
    objective(trial)
    assert trial.user_attrs["stage_steps"] == GradientStage().n_steps
