"""The task models against the slow obvious way: one sentence at a time, as tokens, unpadded."""

from __future__ import annotations

import math
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import counted_passes
from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import embed

from .tiny import ENCODERS
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_encoder
from .tiny import make_examples
from .tiny import make_sequence
from .tiny import N_POSITIONS
from .tiny import TASK_MODELS


PROMPTS = ("this new thing", "wolf", "people write over it")


def token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def hard_prompts(model: TaskModel, tokenizer: Any, length: int = 3) -> Tensor:
    """Three hard prompts of one length, as embeddings (3, L, d)."""
    words = ["wolf new bread this people our".split(), "thing just over our the call".split()]
    words.append(words[1][::-1])
    ids = [token_ids(tokenizer, " ".join(row[:length])) for row in words]
    return embed(ids, model.word_embeddings)


@torch.no_grad()
def features_of_tokens(encoder: Any, tokenizer: Any, prompt: str, example: Example) -> Tensor:
    """Mean-pooled unit features (d,) of a prompt's tokens, behind the ``[CLS]`` if any."""
    pair = [] if example.text_pair is None else [example.text_pair]
    inputs = tokenizer(example.text, *pair)
    ids = token_ids(tokenizer, prompt)
    rows: dict[str, Tensor] = {}
    for name, filler in (
        ("input_ids", ids),
        ("attention_mask", [1] * len(ids)),
        ("token_type_ids", [0] * len(ids)),
    ):
        if name in inputs:
            row = inputs[name]
            n = 1 if inputs["input_ids"][0] == tokenizer.cls_token_id else 0
            rows[name] = torch.tensor([[*row[:n], *filler, *row[n:]]])
    hidden = encoder(**rows).last_hidden_state[0]
    return F.normalize(hidden.mean(0), dim=-1)


def random_head(width: int, n_prompts: int, seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(n_prompts, len(LABELS), width, generator=generator),
        "bias": torch.randn(n_prompts, len(LABELS), generator=generator),
    }


def any_head(model: TaskModel, prompts: Tensor) -> Head:
    """A head that is not the outcome of a fit, which could even differences out."""
    if isinstance(model, DualEncoderClassifier):
        return {}
    width: int = model.encoder.config.hidden_size
    return random_head(width, len(prompts))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Law: a hard prompt at `inputs_embeds` is the hard prompt at `input_ids`.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_sequence_classifier_reads_a_hard_prompt_as_the_plain_encoder_reads_its_tokens(
    encoder: str, pairs: bool, prompt: str
) -> None:
    model = make_sequence(encoder)
    plain, tokenizer = make_encoder(encoder)
    plain.eval()
    examples = make_examples(7, seed=0, pairs=pairs)
    split = model.encode(examples)
    assert len(set(split.lengths)) > 1  # The batch is padded.
    width = plain.config.hidden_size
    # With the identity for a head the logits are the features themselves.
    identity = {"weight": torch.eye(width)[None], "bias": torch.zeros(1, width)}
    prompts = embed([token_ids(tokenizer, prompt)], model.word_embeddings)
    with torch.no_grad():
        features = model.logits(prompts, identity, split)[0] / width**0.5
    expected = [features_of_tokens(plain, tokenizer, prompt, example) for example in examples]
    assert_same(features, torch.stack(expected))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_dual_encoder_compares_texts_with_prompted_names_as_tokens_one_by_one(
    encoder: str, pairs: bool, prompt: str
) -> None:
    model = make_dual(encoder, temperature=0.25)
    plain, tokenizer = make_encoder(encoder)
    plain.eval()
    examples = make_examples(7, seed=0, pairs=pairs)
    prompts = embed([token_ids(tokenizer, prompt)], model.word_embeddings)
    with torch.no_grad():
        logits = model.logits(prompts, {}, model.encode(examples))[0]
    texts = torch.stack([features_of_tokens(plain, tokenizer, "", e) for e in examples])
    names = [Example(label.replace("_", " "), 0) for label in LABELS]
    classes = torch.stack([features_of_tokens(plain, tokenizer, prompt, e) for e in names])
    assert_same(logits, texts @ classes.T / 0.25)


def test_the_real_minilm_reads_a_hard_prompt_as_its_tokens(minilm: Pretrained) -> None:
    labels = ("wild_animal", "food")
    model = DualEncoderClassifier(minilm.encoder, minilm.tokenizer, labels)
    examples = [Example("A wolf was seen.", 0), Example("Bread with cheese, please!", 1)]
    prompt = "message from a customer about"
    prompts = embed([token_ids(minilm.tokenizer, prompt)], model.word_embeddings)
    with torch.no_grad():
        logits = model.logits(prompts, {}, model.encode(examples))[0]

    def features(text: str, example: Example) -> Tensor:
        return features_of_tokens(minilm.encoder, minilm.tokenizer, text, example)

    texts = torch.stack([features("", example) for example in examples])
    names = [Example(label.replace("_", " "), 0) for label in labels]
    classes = torch.stack([features(prompt, name) for name in names])
    assert_same(logits, texts @ classes.T / 0.05, tolerance=1e-4)
    assert logits.argmax(-1).tolist() == [0, 1]


# Laws of a batch.


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_the_logits_of_a_row_do_not_depend_on_the_rest_of_its_batch(
    model_name: str, encoder: str
) -> None:
    model = TASK_MODELS[model_name](encoder)
    prompts = hard_prompts(model, make_encoder(encoder)[1])
    head = any_head(model, prompts)
    split = model.encode(make_examples(9, seed=4))
    with torch.no_grad():
        together = model.logits(prompts, head, split)
        alone = [model.logits(prompts, head, split.select([i])) for i in range(len(split))]
    assert_same(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_prompts_at_once_have_the_logits_of_prompts_one_by_one(
    model_name: str, encoder: str
) -> None:
    model = TASK_MODELS[model_name](encoder)
    prompts = hard_prompts(model, make_encoder(encoder)[1])
    head = any_head(model, prompts)
    split = model.encode(make_examples(5, seed=4))
    with torch.no_grad():
        together = model.logits(prompts, head, split)
        alone = [
            model.logits(prompts[i : i + 1], {k: v[i : i + 1] for k, v in head.items()}, split)
            for i in range(len(prompts))
        ]
    assert together.shape == (3, 5, len(LABELS))
    assert_same(together, torch.cat(alone))
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_examples_keep_their_order_and_labels_through_encoding(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    examples = make_examples(9, seed=5)
    split = model.encode(examples)
    assert split.labels.tolist() == [example.label for example in examples]
    for i, example in enumerate(examples):
        alone = model.encode([example]).inputs
        for name, rows in split.select([i]).inputs.items():
            assert_same(rows, alone[name])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_texts_are_cut_to_the_positions_that_the_longest_prompt_leaves(encoder: str) -> None:
    model = make_sequence(encoder, max_virtual_tokens=6)
    split = model.encode([Example("bread " * 100, 1), Example("wolf", 0)])
    assert split.lengths == (N_POSITIONS - 6, 2 if encoder == "headless" else 3)
    prompts = hard_prompts(model, make_encoder(encoder)[1], length=6)
    assert model.logits(prompts, any_head(model, prompts), split).isfinite().all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_dual_encoder_reads_as_much_of_a_text_as_its_encoder_can(encoder: str) -> None:
    tail = " ".join(["the"] * (N_POSITIONS - (2 if encoder == "headless" else 3)))
    long, last_word, beyond = (
        Example(text, 0) for text in (f"{tail} wolf", f"{tail} bread", f"{tail} wolf bread")
    )
    features = make_dual(encoder).encode([long, last_word, beyond]).inputs["features"]
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    assert_same(features[0], features[2])


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_texts_are_cut_at_max_length_special_tokens_included(model_name: str) -> None:
    model = TASK_MODELS[model_name](max_length=5)
    split = model.encode([Example("new wolf over there again", 0), Example("new wolf over", 0)])
    head = any_head(model, torch.zeros(1))
    prompts = hard_prompts(model, make_encoder()[1])[:1]
    logits = model.logits(prompts, head, split)[0]
    assert_same(logits[0], logits[1])


def test_a_prompt_longer_than_its_reserved_positions_is_refused() -> None:
    model = make_sequence(max_virtual_tokens=2)
    split = model.encode(make_examples(3, seed=0))
    with pytest.raises(ValueError, match="3 virtual tokens.* 2: raise `max_virtual_tokens`"):
        model.logits(torch.zeros(1, 3, 32), random_head(32, 1), split)


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_no_examples_are_refused(model_name: str) -> None:
    with pytest.raises(ValueError, match="`examples` must not be empty"):
        TASK_MODELS[model_name]().encode([])


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        make_dual(temperature=temperature)


# Law: frozen is frozen.


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_a_stage_leaves_every_weight_of_the_model_bit_identical(
    model_name: str, encoder: str
) -> None:
    model = TASK_MODELS[model_name](encoder)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    split = model.encode(make_examples(9, seed=6))
    start = hard_prompts(model, make_encoder(encoder)[1])[0]
    prompts = []
    GradientStage(n_steps=2, lr=0.1, eval_every=1).run(
        model, start, split, split, observe=lambda e: prompts.append(e.prompt) or False
    )
    assert not torch.equal(prompts[0], prompts[-1])  # It did train.
    after = model.encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_gradients_reach_the_prompt_and_the_head_and_nothing_else(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    split = model.encode(make_examples(6, seed=6))
    prompts = hard_prompts(model, make_encoder()[1])[:1].requires_grad_()
    head = {k: v.requires_grad_() for k, v in any_head(model, prompts).items()}
    losses(model.logits(prompts, head, split), split.labels).sum().backward()
    for leaf in (prompts, *head.values()):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert not any(module.training for module in model.encoder.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_a_half_precision_encoder_trains_a_prompt_in_full_precision(
    model_name: str, dtype: torch.dtype
) -> None:
    model = TASK_MODELS[model_name]()
    model.encoder.to(dtype)
    split = model.encode(make_examples(6, seed=6))
    start = hard_prompts(model, make_encoder()[1])[0]
    # Steps so small that they would vanish in half precision.
    steps: list[Tensor] = []
    GradientStage(n_steps=1, lr=1e-6, eval_every=1).run(
        model, start, split, split, observe=lambda e: steps.append(e.prompt) or False
    )
    assert steps[1].dtype == torch.float32
    moved = steps[1] - steps[0]
    assert moved.abs().max() == pytest.approx(1e-6, rel=0.1)
    assert model.logits(start[None], any_head(model, start[None]), split).dtype == torch.float32


# Law: every pass is counted.


def split_of(model: TaskModel, n: int) -> EncodedSplit:
    return model.encode(make_examples(n, seed=7))


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_forward_pass_counts_one_and_the_sequences_of_all_its_prompts(n_prompts: int) -> None:
    dual, sequence = make_dual(), make_sequence()
    for model, n_sequences in ((dual, n_prompts * len(LABELS)), (sequence, n_prompts * 5)):
        split = split_of(model, 5)
        prompts = hard_prompts(model, make_encoder()[1])[:n_prompts]
        with counted_passes(model) as passes:
            evaluate(model, prompts, any_head(model, prompts), split)
        assert (passes.forward, passes.backward, passes.sequences) == (1, 0, n_sequences)


def test_texts_of_a_dual_encoder_are_encoded_once_in_batches() -> None:
    model = make_dual()
    with counted_passes(model) as passes:
        split = split_of(model, 300)
    assert (passes.forward, passes.backward, passes.sequences) == (math.ceil(300 / 128), 0, 300)
    assert len(split) == 300


def test_a_stage_of_a_dual_encoder_costs_a_pass_a_step_and_a_pass_an_evaluation() -> None:
    model = make_dual()
    train, validation = split_of(model, 9), split_of(model, 7)
    start = hard_prompts(model, make_encoder()[1])[0]
    with counted_passes(model) as passes:
        GradientStage(n_steps=5, eval_every=2).run(model, start, train, validation)
    n_evaluations = 4  # at the steps 0, 2, 4, 5
    assert passes.forward == 5 + n_evaluations
    assert passes.backward == 5
    assert passes.sequences == len(LABELS) * (5 + n_evaluations)


def test_a_stage_of_a_sequence_classifier_costs_its_probe_its_batches_and_its_evaluations() -> (
    None
):
    model = make_sequence()
    train, validation = split_of(model, 70), split_of(model, 7)
    start = hard_prompts(model, make_encoder()[1])[0]
    with counted_passes(model) as passes:
        GradientStage(n_steps=7, eval_every=7, batch_size=20).run(model, start, train, validation)
    # The probe takes 64 + 6 examples; an epoch of 20 + 20 + 20 + 10, twice but for one batch.
    assert passes.forward == 2 + 7 + 2
    assert passes.backward == 7
    assert 70 + (140 - 20) + 14 <= passes.sequences <= 70 + (140 - 10) + 14


def test_nothing_is_counted_outside_of_the_block() -> None:
    model = make_dual()
    split = split_of(model, 3)
    prompts = hard_prompts(model, make_encoder()[1])
    with counted_passes(model) as passes:
        pass
    evaluate(model, prompts, {}, split)
    assert passes.forward == 0
    with pytest.raises(RuntimeError), counted_passes(model):
        raise RuntimeError
    assert not model.encoder._forward_hooks


def test_passes_of_another_thread_are_another_trials() -> None:
    model = make_dual()
    split = split_of(model, 3)
    prompts = hard_prompts(model, make_encoder()[1])
    with counted_passes(model) as passes:
        thread = Thread(target=evaluate, args=(model, prompts, {}, split))
        thread.start()
        thread.join()
        assert passes.forward == 0
        evaluate(model, prompts, {}, split)
    assert passes.forward == 1


@pytest.mark.parametrize("n_prompts", [1, 2, 30])
def test_many_prompts_are_evaluated_in_batches_that_fit_into_memory(n_prompts: int) -> None:
    model = make_sequence()
    split = split_of(model, 9)
    prompts = hard_prompts(model, make_encoder()[1])[:1].repeat(n_prompts, 1, 1)
    sizes = []
    handle = model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    evaluate(model, prompts, any_head(model, prompts), split)
    model.fresh_head(prompts, split)
    handle.remove()
    assert sum(sizes) == 2 * 9 * n_prompts
    assert max(sizes) <= 64


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_the_longest_prompt_that_a_model_names_fits_into_its_encoder(
    model_name: str, encoder: str
) -> None:
    model = TASK_MODELS[model_name](encoder)
    longest = model.max_virtual_tokens
    prompts = model.word_embeddings[torch.arange(5, 5 + longest) % 75].detach()[None].float()
    split = model.encode([Example("bread " * 100, 1)])
    assert model.logits(prompts, any_head(model, prompts), split).isfinite().all()
    one_more = torch.cat([prompts, prompts[:, :1]], dim=1)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model.logits(one_more, any_head(model, prompts), split)


# Evaluation and heads.


@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_an_evaluation_is_the_plain_mean_over_examples(
    model_name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TASK_MODELS[model_name]()
    split = split_of(model, 11)
    prompts = hard_prompts(model, make_encoder()[1])
    head = any_head(model, prompts)
    monkeypatch.setattr(model, "evaluation_batch_size", lambda n_prompts: batch_size)
    metrics = evaluate(model, prompts, head, split)
    with torch.no_grad():
        logits = model.logits(prompts, head, split).double()
    for p in range(len(prompts)):
        each = [
            logits[p, b].logsumexp(0) - logits[p, b, label]
            for b, label in enumerate(split.labels.tolist())
        ]
        hits = [
            int(logits[p, b].argmax()) == label for b, label in enumerate(split.labels.tolist())
        ]
        assert metrics.loss[p] == pytest.approx(float(sum(each)) / 11, rel=1e-5)
        assert metrics.accuracy[p] == pytest.approx(sum(hits) / 11)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_predictions_are_the_largest_logits_in_the_order_of_the_split(
    model_name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TASK_MODELS[model_name]()
    split = split_of(model, 11)
    prompts = hard_prompts(model, make_encoder()[1])
    head = model.fresh_head(prompts, split)
    monkeypatch.setattr(model, "evaluation_batch_size", lambda n_prompts: batch_size)
    metrics = evaluate(model, prompts, head, split)
    assert metrics.predictions.shape == (len(prompts), 11)
    assert metrics.predictions.device.type == "cpu"
    assert not metrics.predictions.is_floating_point()
    with torch.no_grad():
        for p in range(len(prompts)):
            prompt, own_head = prompts[p : p + 1], {k: v[p : p + 1] for k, v in head.items()}
            expected = [
                int(model.logits(prompt, own_head, split.select([i]))[0, 0].argmax())
                for i in range(len(split))
            ]
            assert metrics.predictions[p].tolist() == expected
            hits = [a == b for a, b in zip(expected, split.labels.tolist(), strict=True)]
            assert metrics.accuracy[p] == sum(hits) / 11
    if model_name == "sequence":  # Its batches are sorted by length, the predictions are not.
        assert list(split.lengths) != sorted(split.lengths)
        assert len(set(metrics.predictions[0].tolist())) > 1


def test_predictions_do_not_depend_on_the_labels() -> None:
    model = make_sequence()
    examples = make_examples(11, seed=7)
    prompts = hard_prompts(model, make_encoder()[1])
    head = model.fresh_head(prompts, model.encode(examples))
    others = [Example(e.text, (e.label + 1) % len(LABELS)) for e in examples]
    one, two = (evaluate(model, prompts, head, model.encode(rows)) for rows in (examples, others))
    assert torch.equal(one.predictions, two.predictions)
    assert one.accuracy != two.accuracy


def probe_features(model: TaskModel, prompts: Tensor, split: EncodedSplit) -> Tensor:
    width = 32
    identity = {
        "weight": torch.eye(width).expand(len(prompts), -1, -1),
        "bias": torch.zeros(len(prompts), width),
    }
    with torch.no_grad():
        return model.logits(prompts, identity, split)


def test_a_fresh_head_is_the_same_each_time() -> None:
    model = make_sequence()
    split = split_of(model, 20)
    prompts = hard_prompts(model, make_encoder()[1])
    one, two = model.fresh_head(prompts, split), model.fresh_head(prompts, split)
    assert one.keys() == two.keys() == {"weight", "bias"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(rows.requires_grad for rows in one.values())


def test_a_fresh_head_does_not_depend_on_the_prompts_beside_it() -> None:
    model = make_sequence()
    split = split_of(model, 20)
    prompts = hard_prompts(model, make_encoder()[1])
    together = model.fresh_head(prompts, split)
    for p in range(len(prompts)):
        alone = model.fresh_head(prompts[p : p + 1], split)
        for name, rows in alone.items():
            assert_same(together[name][p], rows[0], tolerance=5e-3)


def test_a_fresh_head_on_the_real_minilm_does_not_depend_on_the_prompts_beside_it(
    minilm: Pretrained,
) -> None:
    # Real features are all alike but for a small part, which makes the fit a hard one.
    model = SequenceClassifier(minilm.encoder, minilm.tokenizer, LABELS)
    train, validation = split_of(model, 24), model.encode(make_examples(12, seed=8))
    texts = ("which topic is this", "calm green paper letter", "all of our words")
    prompts = embed([token_ids(minilm.tokenizer, text) for text in texts], model.word_embeddings)
    together = evaluate(model, prompts, model.fresh_head(prompts, train), validation)
    for p, loss in enumerate(together.loss):
        prompt = prompts[p : p + 1]
        alone = evaluate(model, prompt, model.fresh_head(prompt, train), validation)
        assert alone.loss[0] == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_fresh_head_is_where_the_regularised_loss_has_no_slope(n_prompts: int) -> None:
    model = make_sequence()
    split = split_of(model, 20)
    prompts = hard_prompts(model, make_encoder()[1])[:n_prompts]
    head = model.fresh_head(prompts, split)
    features = probe_features(model, prompts, split).double()
    for p in range(n_prompts):
        weight = head["weight"][p].double().requires_grad_()
        bias = head["bias"][p].double().requires_grad_()
        logits = features[p] @ weight.T + bias
        loss = F.cross_entropy(logits, split.labels) + 0.1 / 2 * weight.square().sum()
        loss.backward()
        assert weight.grad is not None
        assert bias.grad is not None
        assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
        assert loss < math.log(len(LABELS))


def test_a_dual_encoder_has_no_head() -> None:
    model = make_dual()
    split = split_of(model, 3)
    assert model.fresh_head(hard_prompts(model, make_encoder()[1]), split) == {}


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_pairs_and_single_texts_are_not_mixed(model_name: str) -> None:
    examples = [Example("wolf", 0, "bread"), Example("bear there", 0)]
    with pytest.raises(ValueError, match="'bear there' has none"):
        TASK_MODELS[model_name]().encode(examples)
