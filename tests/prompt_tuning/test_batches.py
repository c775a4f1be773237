"""Stages in one expanded batch: each comes to what it comes to alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState
import pytest
import torch

from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import KINDS
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .tiny import AlwaysPruner
from .tiny import make_examples
from .tiny import make_objective
from .tiny import TASK_MODELS
from .tiny import tiny_stage


Store = FileSystemArtifactStore
WORDS = [[20, 21, 22], [30, 31, 32], [41, 42, 43]]
METHODS: dict[str, tuple[str, GradientStage]] = {
    "adamw, labels": ("dual", tiny_stage()),
    "sgd, texts and a head": ("sequence", tiny_stage(optimizer="sgd", batch_size=5)),
    "cosine, patience": ("dual", tiny_stage(n_steps=12, schedule="cosine", lr=0.5, patience=1)),
    "contrastive": ("sequence", ContrastiveStage(n_steps=4, lr=0.03, eval_every=2)),
    "low rank": ("lowrank", tiny_stage(gate_lr=0.01)),
    "deep": ("deep", tiny_stage()),
}


def make_runs(name: str) -> list[Run]:
    """Runs of a task model, or of the dual encoder with a kind of prompt."""
    kind = KINDS.get(name, SoftPrompt())
    model = TASK_MODELS["dual" if name in KINDS else name]()
    train, validation = (model.encode(make_examples(18, seed=seed)) for seed in (1, 2))
    return [Run(model, model.start([ids], train, kind), train, validation, 3) for ids in WORDS]


def watched(run: Run) -> tuple[Run, list[Evaluation]]:
    seen: list[Evaluation] = []
    return replace(run, observe=lambda now: bool(seen.append(now))), seen


def assert_alike(one: Evaluation, other: Evaluation) -> None:
    assert one.step == other.step
    assert one.loss == pytest.approx(other.loss, abs=1e-4)
    for name, tensor in one.prompt.tensors.items():
        torch.testing.assert_close(tensor, other.prompt.tensors[name], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_in_one_batch_are_trained_as_if_alone(method: str) -> None:
    model_name, stage = METHODS[method]
    runs, seen = zip(*map(watched, make_runs(model_name)), strict=True)
    together = stage.run_batch(runs)
    for run, result, now in zip(runs, together, seen, strict=True):
        alone, seen_alone = watched(run)
        expected = stage.run(alone)
        assert result.spent == expected.spent
        assert_alike(result.best, expected.best)
        assert [e.step for e in now] == [e.step for e in seen_alone]
        for one, other in zip(now, seen_alone, strict=True):
            assert_alike(one, other)


@pytest.mark.parametrize("method", ["adamw, labels", "contrastive"])
def test_a_prompt_that_diverges_disturbs_no_other(method: str) -> None:
    model_name, stage = METHODS[method]
    runs = make_runs(model_name)
    lost = replace(runs[1], start=runs[1].start.map(lambda tensor: tensor * float("inf")))
    found = stage.run_batch([runs[0], lost, runs[2]])
    assert [result.spent for result in found] == [stage.n_steps, 0, stage.n_steps]
    for run, result in zip((runs[0], runs[2]), found[::2], strict=True):
        assert_alike(result.best, stage.run(run).best)


def test_an_observer_stops_its_own_stage_only() -> None:
    stage, runs = tiny_stage(), make_runs("dual")
    stopped = replace(runs[0], observe=lambda now: now.step == 2)
    found = stage.run_batch([stopped, runs[1]])
    assert [(result.spent, result.stopped) for result in found] == [(2, True), (5, False)]


# In a study.


def run_study(store: Store, n: int, *, size: int, **options: Any) -> list[FrozenTrial]:
    """A study of so many trials, alone or in batches."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    objective = make_objective(options.pop("model", "dual"), store=store, **options)
    if size == 1:
        study.optimize(objective, n_trials=n)
    while len(study.trials) < n:
        objective.run_batch(study, size)
    return study.trials


@pytest.mark.parametrize(
    "options",
    [
        {"model": "sequence"},
        {"n_text_prompts": 1, "later_texts": "prompted"},
        {"stage": BlackBoxStage(n_queries=21)},
    ],
    ids=["texts", "a text prompt first", "a stage that runs alone"],
)
def test_a_study_in_batches_is_the_study(options: dict[str, Any], store: Store) -> None:
    alone = run_study(store, 4, size=1, **options)
    together = run_study(store, 4, size=4, **options)
    for one, other in zip(alone, together, strict=True):
        assert other.state == TrialState.COMPLETE
        assert other.params == one.params
        assert other.value == pytest.approx(one.value, abs=1e-4)
        for name in ("stage_steps", "forward_sequences", "text_prompt", "origin"):
            assert other.user_attrs.get(name) == one.user_attrs.get(name), name
        steps = [[p.step for p in load_trajectory(trial).points] for trial in (one, other)]
        assert steps[0] == steps[1]


def test_a_batch_takes_fewer_passes(store: Store) -> None:
    """Each trial counts those it took part in: as many as alone."""
    objective = make_objective(store=store, n_checked_swaps=0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective.run_batch(study, 1)
    with objective.model.metered() as one:
        objective.run_batch(study, 1)
    with objective.model.metered() as four:
        objective.run_batch(study, 4)
    assert four.sequences == 4 * one.sequences
    assert four.backward == one.backward == 5
    assert len({trial.user_attrs["forward_passes"] for trial in study.trials}) == 1


def test_stages_that_differ_run_apart(store: Store) -> None:
    """Where the study chooses the learning rate of each, say."""

    def make_stage(trial: Any) -> GradientStage:
        return tiny_stage(lr=trial.suggest_categorical("lr", [0.01, 0.1]))

    together = run_study(store, 4, size=4, make_stage=make_stage)
    alone = run_study(store, 4, size=1, make_stage=make_stage)
    assert {trial.params["lr"] for trial in together} == {0.01, 0.1}  # Else nothing is tested.
    for one, other in zip(alone, together, strict=True):
        assert other.value == pytest.approx(one.value, abs=1e-4)


def test_pruned_stages_are_told_so(store: Store) -> None:
    study, told = optuna.create_study(pruner=AlwaysPruner(first=2)), []
    found = make_objective(store=store).run_batch(
        study, 3, callbacks=[lambda _, trial: told.append(trial.number)]
    )
    assert [trial.state for trial in found] == [TrialState.PRUNED] * 3
    assert all(trial.user_attrs["stage_steps"] == 2 for trial in found)
    assert told == [0, 1, 2]


def test_a_pruned_choice_of_a_stage_costs_its_own_trial_only(store: Store) -> None:
    def make_stage(trial: Any) -> GradientStage:
        if trial.number == 1:
            raise optuna.TrialPruned("a stage of no use")
        return tiny_stage()

    study = optuna.create_study()
    make_objective(store=store, make_stage=make_stage).run_batch(study, 3)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_a_trial_that_somebody_ended_ends_its_own_stage_only(store: Store) -> None:
    study = optuna.create_study()

    def end_second(trial: Any, evaluation: Evaluation) -> None:
        if trial.number == 1 and evaluation.step == 0:
            study.tell(1, state=TrialState.FAIL)

    objective = make_objective(store=store, observe=end_second)
    found = objective.run_batch(study, 3)
    assert [trial.state.name for trial in found] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_callback_that_raises_loses_no_stage(store: Store) -> None:
    study = optuna.create_study()
    stop = optuna.study.MaxTrialsCallback(1)
    with pytest.raises(RuntimeError, match="stop"):
        make_objective(store=store).run_batch(study, 3, callbacks=[stop])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


class FailsAtSecond(optuna.samplers.RandomSampler):
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 1:
            raise OSError("no sampler today")


def test_an_error_fails_the_trials_before_it(store: Store) -> None:
    study = optuna.create_study(sampler=FailsAtSecond())
    with pytest.raises(OSError, match="no sampler today"):
        make_objective(store=store).run_batch(study, 3)
    assert not any(trial.state == TrialState.COMPLETE for trial in study.trials)
    # The sampler failed within Optuna's `ask`: nobody but Optuna has the second one.
    assert [trial.state for trial in study.trials if trial.number != 1] == [TrialState.FAIL]


def test_a_batch_needs_a_trial(store: Store) -> None:
    with pytest.raises(ValueError, match="n_trials"):
        make_objective(store=store).run_batch(optuna.create_study(), 0)


def test_what_is_kept_of_a_batch_is_each_ones_own(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(store=store)
    objective.run_batch(study, 3)
    prompts: list[Prompt] = [objective.prompts.load(study, n).prompt for n in range(3)]
    assert all(len(prompt) == 1 for prompt in prompts)
    for number, trial in enumerate(study.trials):
        found = objective.test(objective.prompts.load(study, number))
        assert found.loss > 0
        assert isinstance(study.trials[number], FrozenTrial) and not isinstance(trial, Trial)
    assert not torch.equal(prompts[0].words(), prompts[1].words())
