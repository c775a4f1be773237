"""Prompts before the texts: who trains them, who reads texts under them, and the ensemble."""

from __future__ import annotations

import optuna
from optuna.artifacts._protocol import ArtifactStore as Store
from optuna.trial import TrialState
import pytest
import torch

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_prompt_ensemble
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.ensemble import averaged
from optuna_llm_catalyst.prompt_tuning.ensemble import grouped
from optuna_llm_catalyst.prompt_tuning.ensemble import log_probs
from optuna_llm_catalyst.prompt_tuning.ensemble import member_trials
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.text_prompts import choose
from optuna_llm_catalyst.prompt_tuning.text_prompts import LaterTexts
from optuna_llm_catalyst.prompt_tuning.text_prompts import Reading

from .tiny import hard
from .tiny import make_dual
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_task
from .tiny import soft
from .tiny import TASK_MODELS
from .tiny import tiny_stage


TEXT_STAGE = tiny_stage(batch_size=8, text_lr=0.02)


def two_sided(store: Store, **options: object) -> PromptTuningObjective:
    defaults = {"n_text_prompts": 1, "text_stage": TEXT_STAGE, "later_texts": "turns"}
    return make_objective(store=store, **(defaults | options))


def text_prompts(study: optuna.Study) -> list[int | None]:
    """Which trial's text prompt each stage read texts under."""
    found = [records.load(trial, "stage", StageRecord) for trial in study.trials]
    return [record.text_prompt if record else None for record in found]


def trained(study: optuna.Study, number: int, store: Store) -> Prompt:
    return load_soft_prompt(study, trial_number=number, artifact_store=store).prompt


# Law: texts under a prompt that is kept are the texts that the prompt stands before.


@pytest.mark.parametrize("encoder", ["bert", "roberta", "narrow", "headless"])
def test_cached_texts_are_those_that_a_prompt_stands_before(encoder: str) -> None:
    model = make_dual(encoder)
    examples = make_examples(150, seed=2)  # More than one pass.
    labels, texts = hard(model, "wolf new"), hard(model, "bread over")
    both = Prompt(TwoSidedPrompt(), {"labels": labels.words(), "texts": texts.words()})
    whole = model.log_probs(both, model.encode(examples))
    side, text_prompt = sides(both)
    assert text_prompt is not None
    cached = model.log_probs(side, model.encode(examples, under=text_prompt))
    torch.testing.assert_close(whole, cached, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, model.log_probs(side, model.encode(examples)), atol=1e-3)


def test_texts_under_a_kept_prompt_take_no_other() -> None:
    model = make_dual()
    both = Prompt(
        TwoSidedPrompt(), TwoSidedPrompt().start(hard(model, "wolf new").words(), model.placement)
    )
    split = model.encode(make_examples(4, seed=0), under=sides(both)[1])
    with pytest.raises(ValueError, match="encode them without `under`"):
        model.log_probs(both, split)


def test_both_sides_are_trained_at_their_own_rates() -> None:
    model, task = make_dual(), make_task()
    data = EncodedTask(model, task)
    start = model.start([[7, 8, 9]], data.split("train"), TwoSidedPrompt())
    moved = {}
    for rates in ((0.05, 1e-9), (1e-9, 0.05)):
        stage = GradientStage(n_steps=2, lr=rates[0], text_lr=rates[1], eval_every=1, batch_size=9)
        seen: list[Prompt] = []
        run = Run(
            model,
            start,
            data.split("train"),
            data.split("validation"),
            observe=lambda e, seen=seen: seen.append(e.prompt) or False,
        )
        stage.run(run)
        moved[rates] = {
            side: (seen[-1].tensors[side] - seen[0].tensors[side]).abs().max().item() > 1e-4
            for side in ("labels", "texts")
        }
    assert list(moved.values()) == [
        {"labels": True, "texts": False},
        {"labels": False, "texts": True},
    ]


# Which stage trains a text prompt, and which reads texts under it.


def test_the_first_stage_trains_a_text_prompt_and_others_take_turns(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(two_sided(store), n_trials=6)
    assert text_prompts(study) == [0, None, 0, None, 0, None]
    told = [trial.user_attrs["text_prompt"] for trial in study.trials]
    assert told == ["trained here", "none", "of stage 0"] + ["none", "of stage 0", "none"]
    first = trained(study, 0, store)
    assert first.tensors.keys() == {"labels", "texts"}
    assert not torch.equal(first.tensors["labels"], first.tensors["texts"])
    for number, text_prompt in enumerate(text_prompts(study)):
        tensors = trained(study, number, store).tensors
        assert ("texts" in tensors) == (text_prompt is not None)
        if text_prompt is not None:
            assert torch.equal(tensors["texts"], first.tensors["texts"])


def test_plain_texts_by_default(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(store=store, n_text_prompts=1, text_stage=TEXT_STAGE)
    study.optimize(objective, n_trials=3)
    assert text_prompts(study) == [0, None, None]


def test_other_ways_to_read_later_texts_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="`later_texts` must be .* got 'both'"):
        two_sided(store, later_texts="both")


@pytest.mark.parametrize("later_texts", ["turns", "prompted"])
def test_a_text_prompt_in_every_stage_is_refused_under_a_kept_one(
    store: Store, later_texts: LaterTexts
) -> None:
    with pytest.raises(ValueError, match="two-sided trains a prompt before texts in every"):
        two_sided(store, later_texts=later_texts, prompt_kind=TwoSidedPrompt())


def test_prompted_texts_only(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(two_sided(store, later_texts="prompted"), n_trials=4)
    assert text_prompts(study) == [0, 0, 0, 0]


def test_the_best_text_prompts_are_kept(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(two_sided(store, n_text_prompts=2), n_trials=7)
    first, second = sorted((0, 1), key=lambda number: study.trials[number].value)
    assert text_prompts(study) == [0, 1, None, first, second, None, first]


def test_a_stage_beside_the_one_that_trains_it_reads_plain_texts(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first, seen = study.ask(), []

    def meanwhile(trial: optuna.trial.BaseTrial, evaluation: object) -> None:
        if trial.number == 0 and not seen:
            other = study.ask()
            seen.append(other.number)
            study.tell(other, objective(other))

    objective = two_sided(store, observe=meanwhile)
    study.tell(first, objective(first))
    study.optimize(objective, n_trials=2)
    assert text_prompts(study) == [0, None, 0, None]


def test_one_stage_trains_a_text_prompt_however_long_its_proposal_takes(store: Store) -> None:
    """Other workers see that it does before it has a start."""
    objective, seen = two_sided(store), []

    class Slow(optuna.samplers.RandomSampler):
        def sample_independent(self, study: optuna.Study, trial, name, distribution):  # type: ignore[no-untyped-def]
            if trial.number == 0 and not seen:
                seen.append(choose(study.get_trials(), 1, 1))
            return super().sample_independent(study, trial, name, distribution)

    study = optuna.create_study(sampler=Slow(seed=0))
    study.optimize(objective, n_trials=1)
    assert seen == [Reading()]


@pytest.mark.parametrize("n_first", [1, 2, 3])
def test_a_study_goes_on_with_its_text_prompt(n_first: int, store: Store) -> None:
    values = []
    for parts in ([5], [n_first, 5 - n_first]):
        study = optuna.create_study()
        for n_trials in parts:
            study.sampler = optuna.samplers.RandomSampler(seed=n_trials)
            for number in range(len(study.trials), len(study.trials) + n_trials):
                objective = two_sided(store)  # As in another process.
                objective.space.enqueue(study, f"wolf new {('bread', 'over', 'the')[number % 3]}")
                study.optimize(objective, n_trials=1)
        values.append([trial.value for trial in study.trials])
        assert text_prompts(study) == [0, None, 0, None, 0]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_a_text_prompt_that_cannot_be_loaded_is_done_without(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    optuna.logging.enable_propagation()
    study.optimize(two_sided(store), n_trials=2)
    store.remove(study.trials[0].user_attrs["soft_prompt_artifact"])
    study.optimize(two_sided(store), n_trials=1)
    assert text_prompts(study) == [0, None, None]
    assert "Trial 2 reads plain texts: the soft prompt of trial 0" in caplog.text


def test_choose_needs_no_study() -> None:
    assert choose([], 4, 1) == Reading(4, is_trained=True)
    assert choose([], 4, 0) == Reading()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_refining_trains_what_the_stage_trained(number: int, store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = two_sided(store)
    for i in range(3):
        trial = study.ask()
        objective(trial)
        study.tell(trial, float(i != number))  # The best of them, whatever it came to.
    before = trained(study, number, store)
    refined = objective.refine(study, n_steps=3)
    after = trained(study, refined.number, store)
    assert after.tensors.keys() == before.tensors.keys()
    if "texts" in before.tensors:
        is_kept = torch.equal(after.tensors["texts"], before.tensors["texts"])
        assert is_kept == (number != 0)
    assert text_prompts(study)[-1] == {0: 0, 1: None, 2: 0}[number]


def test_a_model_of_one_side_has_no_text_prompts(store: Store) -> None:
    with pytest.raises(ValueError, match="`n_text_prompts` is 1, but SequenceClassifier"):
        make_objective("sequence", store=store, n_text_prompts=1)
    objective = make_objective("sequence", store=store, n_text_prompts=None)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=1)
    assert text_prompts(study) == [None]


def test_a_prompt_needs_room_before_the_texts(store: Store) -> None:
    with pytest.raises(ValueError, match="keeps room for 2 before a text"):
        two_sided(store, model=make_dual(max_virtual_tokens=2))


# The ensemble.


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_an_ensemble_of_one_is_that_stage(model_name: str, store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(model_name, store=store, n_text_prompts=None)
    study.optimize(objective, n_trials=1)
    model = TASK_MODELS[model_name]()
    groups = averaged(load_prompt_ensemble(study, artifact_store=store).groups, model)
    data = EncodedTask(model, make_task())
    together = log_probs(model, groups, lambda text: data.split("test", text))
    prompt, split = data.read(trained(study, 0, store), "test")
    torch.testing.assert_close(together, model.log_probs(prompt, split)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_the_record_of_the_ensemble_is_what_the_ensemble_says(
    model_name: str, store: Store
) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(model_name, store=store, n_text_prompts=None)
    study.optimize(objective, n_trials=4)
    model = TASK_MODELS[model_name]()
    data = EncodedTask(model, make_task())
    for n in (1, 4):
        whole = load_prompt_ensemble(study, artifact_store=store)
        members = [m for g in whole.groups for m in g.members if m.number < n]
        groups = averaged(grouped(members), model)
        together = log_probs(model, groups, lambda text: data.split("validation", text))
        labels = data.split("validation").labels
        record = records.load_ensemble(study.trials[n - 1])
        assert record is not None
        assert record.n_members == n
        assert record.loss == pytest.approx(losses(together[None], labels)[0].item(), abs=1e-4)
        accuracy = (together.argmax(-1) == labels).double().mean().item()
        assert record.accuracy == pytest.approx(accuracy)
        assert study.trials[n - 1].user_attrs["ensemble_accuracy"] == record.accuracy


def test_all_complete_stages_are_members_and_the_best_on_request(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = two_sided(store)
    study.optimize(objective, n_trials=4)
    study.tell(study.ask(), state=TrialState.FAIL)
    assert load_prompt_ensemble(study, artifact_store=store).numbers == (0, 1, 2, 3)
    ranked = sorted(study.trials[:4], key=lambda trial: trial.value)
    best = load_prompt_ensemble(study, 2, artifact_store=store)
    assert best.numbers == tuple(sorted(trial.number for trial in ranked[:2]))
    refined = objective.refine(study, n_steps=1)
    numbers = {0, 1, 2, 3, refined.number} - {ranked[0].number}
    assert {trial.number for trial in member_trials(study)} == numbers
    with pytest.raises(ValueError, match="`k`"):
        load_prompt_ensemble(study, 0, artifact_store=store)


def test_a_study_without_stages_has_no_ensemble(store: Store) -> None:
    with pytest.raises(CheckpointError, match="no complete stage"):
        load_prompt_ensemble(optuna.create_study(), artifact_store=store)


def test_a_score_in_the_ensemble_is_the_loss_of_the_ensemble_with_it(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = two_sided(store, n_text_prompts=0)
    study.optimize(objective, n_trials=2)
    prompts = [objective.space.from_text(text) for text in ("wolf bread", "new old over")]
    scores = objective.score_in_ensemble(prompts, study)
    model = make_dual()
    features = [model.class_features(trained(study, n, store)) for n in (0, 1)]
    split = model.encode(make_task().validation)
    for prompt, score in zip(prompts, scores, strict=True):
        own = model.class_features(soft(model, model.embed([prompt.token_ids])))
        mean = torch.cat([*features, own]).mean(0)
        logits = split.rows("features") @ torch.nn.functional.normalize(mean, dim=-1).T / 0.05
        slow = torch.nn.functional.cross_entropy(logits, split.labels).item()
        assert score == pytest.approx(slow, abs=1e-4)
    assert objective.score_in_ensemble([], study) == []


def test_a_score_reads_texts_as_the_next_stage_will(store: Store) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = two_sided(store)
    prompt = objective.space.from_text("wolf new bread")
    plain = objective.score([prompt])
    assert objective.score([prompt], study) == plain  # A text prompt will be trained.
    study.optimize(objective, n_trials=2)
    text_prompt = sides(trained(study, 0, store))[1]
    model = make_dual()
    split = model.encode(make_task().validation, under=text_prompt)
    slow = evaluate(model, soft(model, model.embed([prompt.token_ids])), split).loss
    assert objective.score([prompt], study) == pytest.approx(slow, abs=1e-5)
