from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import math
from pathlib import Path
import sys
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial
from optuna.trial import TrialState
import pytest
import torch
from torch import nn

import optuna_llm_catalyst
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.stage_records import settings_of
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult

from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_space
from .tiny import make_task
from .tiny import TASK_MODELS
from .tiny import tiny_stage


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


def fixed_trial(objective: PromptTuningObjective) -> optuna.trial.FixedTrial:
    """A trial of "people write this" without a study."""
    prompt = objective.space.from_text("people write this")
    return optuna.trial.FixedTrial(objective.space.to_params(prompt))


# The contract on a trial.


@each_model
def test_a_trial_carries_its_stage(model_name: str, study: optuna.Study, store: Store) -> None:
    """All that the rest of the package reads."""
    seen: list[Evaluation] = []
    objective = make_objective(model_name, store=store, observe=lambda _, e: seen.append(e))
    prompt = objective.space.enqueue(study, "people write this")
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.params == objective.space.to_params(prompt)
    best = min(seen, key=lambda evaluation: evaluation.loss)
    assert trial.value == best.loss
    assert [e.step for e in seen] == [0, 2, 4, 5]
    assert trial.intermediate_values == {
        e.step: min(earlier.loss for earlier in seen[: i + 1]) for i, e in enumerate(seen)
    }
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
def test_a_trial_counts_its_passes(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    model = TASK_MODELS[model_name]()
    objective = make_objective(store=store, model=model)
    with model.metered() as passes:
        study.optimize(objective, n_trials=1)
    attrs = study.trials[0].user_attrs
    assert attrs["forward_passes"] == passes.forward
    assert attrs["backward_passes"] == passes.backward
    assert attrs["forward_sequences"] == passes.sequences
    assert passes.backward >= 5


@each_model
def test_a_trial_counts_the_passes_of_its_screening(model_name: str, store: Store) -> None:
    model = TASK_MODELS[model_name]()
    objective = make_objective(store=store, model=model)
    sampler = LLMCatalystSampler(
        objective.space, screen=objective.score, n_startup_trials=1, n_candidates=3, seed=0
    )
    study = optuna.create_study(sampler=sampler)
    with model.metered() as passes:
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
    start = TASK_MODELS[model_name]().embed([trained.facts.token_ids])
    assert not torch.equal(trained.prompt.words(), start)


@each_model
@pytest.mark.parametrize("kind", ["fixed", "frozen"])
def test_a_trial_without_a_study_has_the_same_record(
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
    studys_own = {
        "soft_prompt_artifact": study.best_trial.user_attrs["soft_prompt_artifact"],
        "origin": "enqueued",
        "ensemble_accuracy": study.best_trial.user_attrs["ensemble_accuracy"],
    }
    # The study's ensemble costs passes, too.
    for key in ("forward_passes", "forward_sequences"):
        studys_own[key] = study.best_trial.user_attrs[key]
        assert trial.user_attrs[key] < studys_own[key]
    assert trial.user_attrs | studys_own == study.best_trial.user_attrs
    assert load_trajectory(trial) == load_trajectory(study.best_trial)


@each_model
def test_a_prompts_value_does_not_depend_on_when(model_name: str, store: Store) -> None:
    study = optuna.create_study()
    objective = make_objective(model_name, store=store)
    for text in ("people write this", "wolf bread saw", "people write this"):
        objective.space.enqueue(study, text)
    study.optimize(objective, n_trials=3)
    one, between, two = study.trials
    assert one.value == two.value != between.value
    assert one.intermediate_values == two.intermediate_values
    assert load_trajectory(one) == load_trajectory(two)


def test_tokens_that_are_no_words_name_themselves(store: Store) -> None:
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
    stage = tiny_stage(n_steps=6, lr=3e38, optimizer="sgd", eval_every=3)
    objective = make_objective(model_name, store=store, stage=stage)
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    assert trial.value == trajectory.points[0].loss
    assert math.isnan(trajectory.points[-1].loss)
    assert trial.user_attrs["stage_steps"] == 3
    assert trial.intermediate_values == {0: trial.value, 3: trial.value}
    trained = load_soft_prompt(study, artifact_store=store)
    assert trained.prompt.is_finite()


def test_stages_of_many_threads_do_not_meet(store: Store) -> None:
    """``n_jobs > 1`` on one objective: all complete, and each counts its own passes."""
    model = make_dual()
    objective = make_objective(store=store, model=model, stage=tiny_stage(n_steps=2))
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with model.metered() as passes_of_this_thread:
            study.optimize(objective, n_trials=24, n_jobs=4)
    finally:
        sys.setswitchinterval(interval)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 24
    assert passes_of_this_thread.forward == 0
    for trial in study.trials:
        alone = optuna.trial.FixedTrial(trial.params)
        assert objective(alone) == pytest.approx(trial.value, abs=1e-5)
        assert trial.user_attrs["prompt"] == alone.user_attrs["prompt"]
        # The study's ensemble reads each stage's class names once.
        more = {"forward_passes": 1, "backward_passes": 0, "forward_sequences": len(LABELS)}
        for key, n in more.items():
            assert trial.user_attrs[key] == alone.user_attrs[key] + n


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


def test_no_prompts_have_no_scores(store: Store) -> None:
    assert make_objective(store=store).score([]) == []


@each_model
def test_the_loss_of_projected_words_is_their_score(model_name: str, store: Store) -> None:
    objective = make_objective(model_name, store=store)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    trajectory = load_trajectory(study.best_trial)
    assert trajectory is not None
    prompts = [objective.space.from_token_ids(point.token_ids) for point in trajectory.points]
    for point, score in zip(trajectory.points, objective.score(prompts), strict=True):
        assert point.hard_loss == pytest.approx(score, abs=1e-3)


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


@each_model
def test_a_resumed_study_goes_on_as_if_uninterrupted(
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


# Stages.


def test_the_default_stage_is_gradient_descent(store: Store) -> None:
    model = make_dual()
    objective = PromptTuningObjective(model, make_task(), make_space(), artifact_store=store)
    trial = optuna.trial.FixedTrial(make_space().to_params(make_space().from_text("wolf")))
    objective(trial)
    assert trial.user_attrs["stage_steps"] == GradientStage().n_steps


def stage_with_lr(trial: BaseTrial) -> GradientStage:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    return GradientStage(n_steps=2, lr=lr, eval_every=2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stage_can_be_made_of_suggestions(sampler: str, store: Store) -> None:
    objective = make_objective(store=store, make_stage=stage_with_lr)
    study = optuna.create_study(sampler=SAMPLERS[sampler]())
    study.optimize(objective, n_trials=4)
    for trial in study.trials:
        fixed = make_objective(
            store=store, stage=GradientStage(n_steps=2, lr=trial.params["lr"], eval_every=2)
        )
        assert fixed(optuna.trial.FixedTrial(trial.params)) == trial.value
    assert len({trial.params["lr"] for trial in study.trials}) == 4


def test_a_stage_and_a_function_to_one_are_refused_together(store: Store) -> None:
    with pytest.raises(ValueError, match="`stage` or `make_stage`, not both"):
        make_objective(store=store, make_stage=stage_with_lr, stage=tiny_stage())


class ModuleStage(nn.Module):
    """A stage that is no dataclass and can be called."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.scale = nn.Parameter(torch.ones(1))

    def with_budget(self, budget: int) -> ModuleStage:
        return ModuleStage(budget)

    def run(self, run: Run) -> StageResult:
        return tiny_stage(n_steps=self.budget).run(run)

    def forward(self, trial: BaseTrial) -> Stage:
        raise AssertionError("a stage is no factory")


class SilentStage(ModuleStage):
    """A stage that observes nothing."""

    def with_budget(self, budget: int) -> SilentStage:
        return SilentStage(budget)

    def run(self, run: Run) -> StageResult:
        return super().run(replace(run, observe=lambda _: False))


@pytest.mark.parametrize("stage_class", [ModuleStage, SilentStage])
def test_a_stage_may_be_a_module(stage_class: type[ModuleStage], store: Store) -> None:
    objective = make_objective(store=store, stage=stage_class(5))
    study = optuna.create_study()
    objective.space.enqueue(study, "people write this")
    study.optimize(objective, n_trials=1)
    plain = make_objective(store=store)
    assert study.best_value == plain(fixed_trial(plain))
    refined = objective.refine(study, n_steps=7)
    assert refined.user_attrs["stage_steps"] == 7
    assert settings_of(stage_class(5), make_dual()) == {
        "stage": stage_class.__name__,
        "budget": 5,
        "temperature": 0.05,
        "max_length": None,
        "max_virtual_tokens": 8,
    }


class TwiceStage(GradientStage):
    """A stage that looks twice at each of its steps, the second time at something worse."""

    def run(self, run: Run) -> StageResult:
        def observe(evaluation: Evaluation) -> bool:
            stopped = run.observe(evaluation)
            return run.observe(replace(evaluation, loss=evaluation.loss + 1)) or stopped

        return super().run(replace(run, observe=observe))


def test_a_stage_may_observe_a_step_twice(store: Store) -> None:
    values = {}
    for kind in (GradientStage, TwiceStage):
        study = optuna.create_study()
        objective = make_objective(store=store, stage=kind(n_steps=4, lr=0.03, eval_every=2))
        objective.space.enqueue(study, "people write this")
        study.optimize(objective, n_trials=1)
        [trial] = study.trials
        values[kind] = (trial.value, trial.intermediate_values, load_trajectory(trial))
    assert values[GradientStage] == values[TwiceStage]


@each_model
def test_a_stage_that_observes_nothing_shows_its_best(model_name: str, store: Store) -> None:
    # A prompt that ends in the word that pads would be shown without it.
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(make_objective(model_name, store=store, stage=SilentStage(5)), n_trials=1)
    [trial] = study.trials
    trajectory = load_trajectory(trial)
    assert trajectory is not None
    [point] = trajectory.points
    assert (point.loss, point.accuracy) == (trial.value, trial.user_attrs["accuracy"])
    assert point.text == trial.user_attrs["tuned_prompt"]
    assert trial.intermediate_values == {}
    assert load_soft_prompt(study, artifact_store=store).facts.text == trial.user_attrs["prompt"]


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


def test_a_space_of_too_many_tokens_is_refused(store: Store) -> None:
    space = PromptSpace(make_space().tokenizer, 3, vocab_size=1000)
    with pytest.raises(ValueError, match="`space` has 1000 tokens, `model` embeds 75"):
        make_objective(store=store, space=space)


@each_model
def test_a_space_of_too_long_prompts_is_refused(model_name: str, store: Store) -> None:
    model = TASK_MODELS[model_name]()
    longest = model.placement.max_virtual_tokens
    make_objective(store=store, model=model, length=longest)
    with pytest.raises(ValueError, match=f"{longest + 1} virtual tokens, .* room for {longest}"):
        make_objective(store=store, model=model, length=longest + 1)


# The real model.


def test_a_stage_on_minilm_lowers_the_demos_loss(minilm: Pretrained, store: Store) -> None:
    folder = Path(optuna_llm_catalyst.__file__).parent / "demo" / "customer_support"
    task = few_shot(load_task(folder), shots=4, seed=0)
    model = DualEncoderClassifier(minilm, task.labels)
    objective = PromptTuningObjective(
        model,
        task,
        PromptSpace(minilm.tokenizer, 4),
        stage=GradientStage(n_steps=6, eval_every=3),
        text_stage=GradientStage(n_steps=6, eval_every=3, batch_size=8),
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
