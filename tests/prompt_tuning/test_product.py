"""What a study leaves, beside what it is compared with."""

from __future__ import annotations

import optuna
from optuna.artifacts._protocol import ArtifactStore as Store
import pytest
import torch
import torch.nn.functional as F

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import baselines
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import product
from optuna_llm_catalyst.prompt_tuning.checkpoints import best_trial
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.ensemble import averaged
from optuna_llm_catalyst.prompt_tuning.ensemble import load_prompt_ensemble
from optuna_llm_catalyst.prompt_tuning.fitted import fit_groups
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_readout
from optuna_llm_catalyst.prompt_tuning.product_store import save_product

from .tiny import hard
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_objective
from .tiny import make_task
from .tiny import TASK_MODELS
from .tiny import tiny_stage
from .tiny import tiny_tokenizer


ROWS = {
    "dual": [
        baselines.NO_PROMPT,
        baselines.PROBE,
        baselines.PULLED_PROBE,
        product.FIRST,
        product.CHOSEN,
        product.ENSEMBLE,
        product.FITTED,
    ],
    "sequence": [baselines.PROBE, product.FIRST, product.CHOSEN, product.ENSEMBLE],
}


def make_study(model_name: str, store: Store, n_trials: int = 3, **options: object) -> tuple:
    objective = make_objective(
        model_name,
        store=store,
        **({"n_text_prompts": None, "text_stage": tiny_stage(batch_size=8)} | options),
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=n_trials)
    return objective, study


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_a_product_is_measured_beside_its_baselines(model_name: str, store: Store) -> None:
    objective, study = make_study(model_name, store)
    found = product.measure(objective, study)
    assert list(found.log_probs) == ROWS[model_name]
    assert found.name == ROWS[model_name][-1]
    for log_probs in found.log_probs.values():
        assert log_probs.shape == (len(make_task().test), len(LABELS))
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs)))
    first = objective.prompts.load(study, 0)
    labels = torch.tensor([example.label for example in make_task().test])
    predicted = found.log_probs[product.FIRST].argmax(-1)
    accuracy = (predicted == labels).double().mean().item()
    assert objective.test(first).accuracy == pytest.approx(accuracy)


def test_without_test_examples_there_is_a_product_and_no_rows(store: Store) -> None:
    objective, study = make_study("dual", store, task=make_task(test=()))
    found = product.measure(objective, study)
    assert found.log_probs == {}
    assert all(group.readout is not None for group in found.classifier.ensemble.groups)


def test_a_study_without_stages_has_no_product(store: Store) -> None:
    objective, _ = make_study("dual", store)
    with pytest.raises(CheckpointError, match="no complete stage"):
        product.measure(objective, optuna.create_study())


def test_each_group_is_fitted_on_its_own_texts(store: Store) -> None:
    _, study = make_study("dual", store, n_trials=4)
    model = make_dual()
    data = EncodedTask(model, make_task())
    groups = averaged(load_prompt_ensemble(study, artifact_store=store).groups, model)
    assert [group.text_prompt is None for group in groups] == [True, False]
    for before, after in zip(groups, fit_groups(groups, data), strict=True):
        splits = [
            model.encode(examples, under=before.text_prompt)
            for examples in (make_task().train, make_task().validation)
        ]
        train, validation = ((s.rows("features"), s.labels) for s in splits)
        assert before.readout is not None
        assert after.readout is not None
        expected = fit_readout(train, validation, before.readout).readout
        torch.testing.assert_close(after.readout.weights, expected.weights)
        assert after.readout.scale == expected.scale


def test_class_names_alone_are_names_without_a_prompt() -> None:
    model = make_dual()
    data = EncodedTask(model, make_task())
    readouts = baselines.readouts(model, data, encode)
    names = [label.replace("_", " ") for label in LABELS]
    tokens = [tiny_tokenizer()(name, return_tensors="pt") for name in names]
    with torch.no_grad():
        hidden = [model.encoder(**each).last_hidden_state[0].mean(0) for each in tokens]
    expected = F.normalize(torch.stack(hidden), dim=-1)
    torch.testing.assert_close(readouts[baselines.NO_PROMPT].weights, expected)
    log_probs = readouts[baselines.NO_PROMPT].log_probs(data.split("test").rows("features"))
    cosines = data.split("test").rows("features") @ expected.T
    torch.testing.assert_close(log_probs, (cosines / 0.05).log_softmax(-1))


def test_templates_stand_before_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "TEMPLATES", ("this new", "wolf"))
    model = make_dual()
    data = EncodedTask(model, make_task())
    found = baselines.readouts(model, data, encode)[baselines.PULLED_PROBE]
    each = [model.class_features(hard(model, text))[0] for text in ("this new", "wolf")]
    names = baselines.readouts(model, data, encode)[baselines.NO_PROMPT].weights
    start = F.normalize(torch.stack([names, *each]).mean(0), dim=-1)
    examples = [(s.rows("features"), s.labels) for s in map(data.split, ("train", "validation"))]
    expected = fit_readout(*examples, baselines.Readout(start, model.scale)).readout
    torch.testing.assert_close(found.weights, expected.weights)


def encode(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_a_product_without_a_lost_stage_is_loaded_all_the_same(store: Store) -> None:
    """Another machine's prompt is not in this machine's store."""
    objective, study = make_study("dual", store, n_text_prompts=0)
    store.remove(study.trials[1].user_attrs["soft_prompt_artifact"])
    here = make_objective("dual", store=store, n_text_prompts=0)
    made = product.measure(here, study).classifier
    assert made.ensemble.numbers == (0, 2)
    save_product(study, made, store)
    loaded = load_classifier(study, artifact_store=store, model=make_dual())
    assert loaded.ensemble.numbers == (0, 2) and loaded.is_fitted


def test_the_chosen_row_is_the_chosen_stage_and_the_first_the_first(store: Store) -> None:
    """Of equal stages the one of the lowest loss is chosen; a refined stage stays the first."""
    objective = make_objective("dual", store=store, metric="accuracy", n_text_prompts=0)
    study = optuna.create_study(direction="maximize")
    for _ in range(3):
        trial = study.ask()
        objective(trial)
        study.tell(trial, 0.5)
    best = best_trial(study)
    objective.refine(study, n_steps=1)
    rows = product.measure(objective, study).log_probs
    for name, number in ((product.FIRST, 0), (product.CHOSEN, best_trial(study).number)):
        prompt, split = objective.data.read(objective.prompts.load(study, number).prompt, "test")
        torch.testing.assert_close(rows[name], objective.model.log_probs(prompt, split)[0])
    assert best.value == 0.5


def test_a_refined_stage_takes_the_place_of_what_it_continues(store: Store) -> None:
    objective, study = make_study("dual", store)
    refined = objective.refine(study, n_steps=1)
    record = records.load_ensemble(refined)
    assert record is not None and record.n_members == 3
