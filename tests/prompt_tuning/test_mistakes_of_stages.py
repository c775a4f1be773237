from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage
import pytest

from optuna_llm_catalyst import records
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import StageResult

from .tiny import AlwaysPruner
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_task
from .tiny import TASK_MODELS
from .tiny import tiny_stage


each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
Store = FileSystemArtifactStore


def make_told_task(*, pairs: bool = False) -> Task:
    """A task every text of which has a word that nothing else has."""
    splits = {"train": (24, 1), "validation": (18, 9), "test": (6, 3)}
    return make_task(
        **{
            name: tuple(
                replace(example, text=f"{example.text} secret{name}{i}x")
                for i, example in enumerate(make_examples(n, seed=seed, pairs=pairs))
            )
            for name, (n, seed) in splits.items()
        }
    )


def stored(study: optuna.Study) -> str:
    """All that a study's storage knows of its trials."""
    return repr([(t.params, t.user_attrs, t.system_attrs) for t in study.get_trials()])


@each_model
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_trial_tells_its_prompts_mistakes(
    shared: bool, pairs: bool, model_name: str, study: optuna.Study, store: Store
) -> None:
    task = make_told_task(pairs=pairs)
    objective = make_objective(model_name, store=store, task=task, share_examples=shared)
    study.optimize(objective, n_trials=2)
    model = TASK_MODELS[model_name]()
    split = model.encode(task.validation)
    for trial in study.trials:
        trained = load_soft_prompt(study, trial_number=trial.number, artifact_store=store)
        predictions = evaluate(model, trained.prompt, split).predictions[0]
        errors = [
            (task.labels[e.label], task.labels[int(predicted)], e.text, e.text_pair)
            for e, predicted in zip(task.validation, predictions, strict=True)
            if e.label != predicted
        ]
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
        assert {(t.label, t.predicted, t.text, t.text_pair) for t in mistakes.texts} <= set(errors)
        assert all((t.text_pair is not None) is pairs for t in mistakes.texts)


@each_model
@pytest.mark.parametrize("shared", [False, True])
def test_texts_are_stored_only_if_shared(
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

    def run(self, run: Run) -> StageResult:
        observe = run.observe
        seen = replace(run, observe=lambda e: observe(replace(e, predictions=None)))
        result = super().run(seen)
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
            with model.metered() as passes:
                values.append(objective(trial))
            n_passes.append((passes.forward, passes.backward, passes.sequences))
            mistakes.append(records.load_mistakes(trial))
    assert len(set(n_passes)) == len(set(values)) == 1
    assert [row is None for row in mistakes] == [False, False, True, True]
    assert mistakes[0] == replace(mistakes[1] or Mistakes(), texts=())


def test_pruned_and_refined_stages_tell_their_mistakes(store: Store) -> None:
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


def test_the_mistakes_are_those_of_the_best_evaluation(store: Store) -> None:
    seen: list[Evaluation] = []
    stage = tiny_stage(n_steps=6, lr=3e38, optimizer="sgd", eval_every=3)
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
    assert not best.predictions.equal(seen[-1].predictions)
    labels = [example.label for example in objective.task.validation]
    n_errors = sum(a != b for a, b in zip(best.predictions.tolist(), labels, strict=True))
    mistakes = records.load_mistakes(trial)
    assert mistakes is not None
    assert sum(c.count for c in mistakes.confusions) == n_errors
