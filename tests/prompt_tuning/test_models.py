"""The task models against the slow obvious way: one sentence at a time, as tokens, unpadded."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import itertools
from typing import Any
from typing import get_args

from optuna.artifacts import FileSystemArtifactStore
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.models.sequence_classifier import PromptPosition
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.prompts import Tensors
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .tiny import any_head
from .tiny import ENCODERS
from .tiny import features
from .tiny import hard
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_encoder
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_pretrained
from .tiny import make_sequence
from .tiny import N_POSITIONS
from .tiny import soft
from .tiny import TASK_MODELS
from .tiny import VOCABULARY


PROMPTS = ("this new thing", "wolf", "people write over it")
each_encoder = pytest.mark.parametrize("encoder", ENCODERS)
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
each_position = pytest.mark.parametrize("position", get_args(PromptPosition))


def three_prompts(model: TaskModel) -> Prompt:
    """Three hard prompts of one length, each with a head where the model has one."""
    prompt = hard(model, "wolf new bread", "thing just over", "call the our")
    return prompt.with_head(any_head(model, len(prompt)))


def read_as_tokens(
    tokenizer: Any, prompt: str, example: Example, position: PromptPosition = "behind_cls"
) -> tuple[dict[str, Tensor], int]:
    """A prompt's tokens before an example's, behind the ``[CLS]`` if any, and where they begin."""
    pair = [] if example.text_pair is None else [example.text_pair]
    inputs = tokenizer(example.text, *pair)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    is_behind = position == "behind_cls" and inputs["input_ids"][0] == tokenizer.cls_token_id
    n = 1 if is_behind else 0
    fillers = {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * len(ids),
    }
    rows = {
        name: torch.tensor([[*inputs[name][:n], *filler, *inputs[name][n:]]])
        for name, filler in fillers.items()
        if name in inputs
    }
    return rows, n


@torch.no_grad()
def features_of_tokens(
    encoder: Any,
    tokenizer: Any,
    prompt: str,
    example: Example,
    position: PromptPosition = "behind_cls",
) -> Tensor:
    """Mean-pooled unit features (d,) of a prompt's tokens before an example's."""
    rows, _ = read_as_tokens(tokenizer, prompt, example, position)
    return F.normalize(encoder(**rows).last_hidden_state[0].mean(0), dim=-1)


@torch.no_grad()
def features_of_embeddings(
    encoder: Any, tokenizer: Any, prompt: Tensor, example: Example
) -> Tensor:
    """The same for virtual tokens (L, d): they take the place of as many words."""
    rows, n = read_as_tokens(tokenizer, " ".join(["the"] * len(prompt)), example)
    embeddings = encoder.get_input_embeddings()(rows.pop("input_ids"))
    embeddings[0, n : n + len(prompt)] = prompt
    hidden = encoder(inputs_embeds=embeddings, **rows).last_hidden_state
    return F.normalize(hidden[0].mean(0), dim=-1)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Law: a hard prompt at `inputs_embeds` is the hard prompt at `input_ids`.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@each_position
@each_encoder
def test_sequence_classifier_reads_a_hard_prompt_as_tokens(
    encoder: str, position: PromptPosition, pairs: bool, prompt: str
) -> None:
    model = make_sequence(encoder, prompt_position=position)
    plain, tokenizer = make_encoder(encoder)
    plain.eval()
    examples = make_examples(7, seed=0, pairs=pairs)
    split = model.encode(examples)
    assert len(set(split.lengths)) > 1  # The batch is padded.
    expected = [features_of_tokens(plain, tokenizer, prompt, e, position) for e in examples]
    assert_same(features(model, hard(model, prompt), split)[0], torch.stack(expected))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@each_encoder
def test_dual_encoder_reads_a_hard_prompt_as_tokens(
    encoder: str, pairs: bool, prompt: str
) -> None:
    model = make_dual(encoder, temperature=0.25, max_virtual_tokens=0)
    plain, tokenizer = make_encoder(encoder)
    plain.eval()
    examples = make_examples(7, seed=0, pairs=pairs)
    with torch.no_grad():
        log_probs = model.log_probs(hard(model, prompt), model.encode(examples))[0]
    texts = torch.stack([features_of_tokens(plain, tokenizer, "", e) for e in examples])
    names = [Example(label.replace("_", " "), 0) for label in LABELS]
    classes = torch.stack([features_of_tokens(plain, tokenizer, prompt, e) for e in names])
    assert_same(log_probs, F.log_softmax(texts @ classes.T / 0.25, dim=-1))


def test_minilm_reads_a_hard_prompt_as_tokens(minilm: Pretrained) -> None:
    labels = ("wild_animal", "food")
    model = DualEncoderClassifier(minilm, labels)
    examples = [Example("A wolf was seen.", 0), Example("Bread with cheese, please!", 1)]
    text = "message from a customer about"
    prompt = hard(model, text, tokenizer=minilm.tokenizer)
    with torch.no_grad():
        log_probs = model.log_probs(prompt, model.encode(examples))[0]

    def rows(text: str, examples: list[Example]) -> Tensor:
        read = [features_of_tokens(minilm.encoder, minilm.tokenizer, text, e) for e in examples]
        return torch.stack(read)

    names = [Example(label.replace("_", " "), 0) for label in labels]
    logits = rows("", examples) @ rows(text, names).T / 0.05
    assert_same(log_probs, F.log_softmax(logits, dim=-1), tolerance=1e-4)
    assert log_probs.argmax(-1).tolist() == [0, 1]


@each_model
def test_log_probs_are_normalised(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    log_probs = model.log_probs(three_prompts(model), model.encode(make_examples(5, seed=4)))
    assert log_probs.shape == (3, 5, len(LABELS))
    assert_same(log_probs.exp().sum(-1), torch.ones(3, 5))


@pytest.mark.parametrize("encoder", ["bert", "roberta"])
def test_a_prompt_of_one_position_is_no_prompt_of_another(
    encoder: str, store: FileSystemArtifactStore
) -> None:
    behind, front = (make_sequence(encoder, prompt_position=p) for p in get_args(PromptPosition))
    assert (behind.prompt_position, front.prompt_position) == get_args(PromptPosition)
    split = behind.encode(make_examples(5, seed=4))
    prompt = three_prompts(behind)
    difference = behind.log_probs(prompt, split) - front.log_probs(prompt, split)
    assert difference.abs().max() > 0.01
    assert behind.settings.items() ^ front.settings.items() == {
        ("prompt_position", "behind_cls"),
        ("prompt_position", "front"),
    }
    for model, other in ((behind, front), (front, behind)):
        facts = PromptFacts("the our", (1, 2, 3), LABELS, encoder, other.fingerprint)
        objective = make_objective(store=store, model=model)
        with pytest.raises(CheckpointError, match="use the model and the task model of its study"):
            objective.test(TrainedPrompt(prompt[[0]], facts))


# Laws of a batch.


@each_encoder
@each_model
def test_a_row_does_not_depend_on_its_batch(model_name: str, encoder: str) -> None:
    model = TASK_MODELS[model_name](encoder)
    prompt = three_prompts(model)
    split = model.encode(make_examples(9, seed=4))
    with torch.no_grad():
        together = model.log_probs(prompt, split)
        alone = [model.log_probs(prompt, split.select([i])) for i in range(len(split))]
    assert_same(together, torch.cat(alone, dim=1))


@each_encoder
@each_model
def test_a_prompt_does_not_depend_on_the_prompts_beside_it(model_name: str, encoder: str) -> None:
    model = TASK_MODELS[model_name](encoder)
    prompt = three_prompts(model)
    split = model.encode(make_examples(5, seed=4))
    with torch.no_grad():
        together = model.log_probs(prompt, split)
        alone = [model.log_probs(prompt[[i]], split) for i in range(len(prompt))]
    assert_same(together, torch.cat(alone))
    assert (together[0] - together[1]).abs().max() > 0.01


@each_model
def test_examples_keep_their_order_through_encoding(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    examples = make_examples(9, seed=5)
    split = model.encode(examples)
    assert split.examples == examples
    assert split.labels.tolist() == [example.label for example in examples]
    for i, example in enumerate(examples):
        alone = model.encode([example])
        for name, field in split.select([i]).fields.items():
            assert_same(field.rows, alone.rows(name))


@each_encoder
def test_texts_are_cut_to_what_the_longest_prompt_leaves(encoder: str) -> None:
    model = make_sequence(encoder, max_virtual_tokens=6)
    split = model.encode([Example("bread " * 100, 1), Example("wolf", 0)])
    assert split.lengths == (N_POSITIONS - 6, 2 if encoder == "headless" else 3)
    assert model.max_text_tokens == N_POSITIONS - 6
    prompt = hard(model, "wolf new bread this people our")
    assert model.log_probs(prompt.with_head(any_head(model)), split).isfinite().all()


@each_encoder
def test_dual_encoder_reads_all_of_a_text_that_fits(encoder: str) -> None:
    tail = " ".join(["the"] * (N_POSITIONS - (2 if encoder == "headless" else 3)))
    texts = (f"{tail} wolf", f"{tail} bread", f"{tail} wolf bread")
    rows = (
        make_dual(encoder, max_virtual_tokens=0)
        .encode([Example(text, 0) for text in texts])
        .rows("features")
    )
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    assert_same(rows[0], rows[2])


@each_model
def test_texts_are_cut_at_max_length(model_name: str) -> None:
    """Special tokens are included in it."""
    model = TASK_MODELS[model_name](max_length=5)
    split = model.encode([Example("new wolf over there again", 0), Example("new wolf over", 0)])
    log_probs = model.log_probs(three_prompts(model), split)
    assert_same(log_probs[:, 0], log_probs[:, 1])


@each_encoder
@each_model
def test_the_longest_prompt_fits_into_the_encoder(model_name: str, encoder: str) -> None:
    model = TASK_MODELS[model_name](encoder)
    longest = model.placement.max_virtual_tokens
    ids = [5 + i % 70 for i in range(longest)]
    split = model.encode([Example("bread " * 100, 1)])
    prompt = soft(model, model.embed([ids]), any_head(model))
    assert model.log_probs(prompt, split).isfinite().all()
    one_more = soft(model, model.embed([[*ids, 5]]), any_head(model))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model.log_probs(one_more, split)


# Law: no pass grows with the prompts, the texts or the labels.


@contextmanager
def recorded_passes(model: Any) -> Iterator[list[int]]:
    """The sequences of each pass within a ``with`` block."""
    sizes: list[int] = []

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["inputs_embeds"]))

    handle = model.encoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def many_prompts(model: TaskModel, n: int) -> Prompt:
    """``n`` different prompts of two words, each with its own head where the model has one."""
    pairs = itertools.islice(itertools.permutations(VOCABULARY[:40], 2), n)
    return hard(model, *(" ".join(pair) for pair in pairs)).with_head(any_head(model, n))


MANY_LABELS = tuple("_".join(pair) for pair in itertools.permutations(VOCABULARY[:15], 2))


@pytest.mark.parametrize(
    ("n_prompts", "n_labels", "n_passes"), [(1, 150, 1), (40, 150, 25), (300, 3, 6)]
)
def test_dual_encoder_bounds_its_passes(n_prompts: int, n_labels: int, n_passes: int) -> None:
    """No pass has more than 256 sequences, and no class is read twice."""
    model = DualEncoderClassifier(make_pretrained(), MANY_LABELS[:n_labels])
    split = model.encode(make_examples(4, seed=0))
    prompt = many_prompts(model, n_prompts)
    with recorded_passes(model) as sizes:
        together = evaluate(model, prompt, split)
    assert max(sizes) <= 256
    assert (len(sizes), sum(sizes)) == (n_passes, n_prompts * n_labels)
    for i in (0, n_prompts // 2, n_prompts - 1):
        alone = evaluate(model, prompt[[i]], split)
        assert together.loss[i] == pytest.approx(alone.loss[0], rel=1e-4)


@pytest.mark.parametrize("n_prompts", [1, 2, 30, 70])
def test_sequence_classifier_bounds_its_passes(n_prompts: int) -> None:
    """No pass has more than 64 sequences, neither of an evaluation nor of the fit of heads."""
    model = make_sequence()
    split = model.encode(make_examples(9, seed=7))
    prompt = many_prompts(model, n_prompts)
    with recorded_passes(model) as sizes:
        together = evaluate(model, prompt, split)
        model.fresh_head(prompt, split)
    assert max(sizes) <= 64
    assert sum(sizes) == 2 * 9 * n_prompts
    for i in (0, n_prompts // 2, n_prompts - 1):
        alone = evaluate(model, prompt[[i]], split)
        assert together.loss[i] == pytest.approx(alone.loss[0], rel=1e-4)
        assert torch.equal(together.predictions[i], alone.predictions[0])


# Other kinds of prompts.


@dataclass(frozen=True)
class InputPrompt(SoftPrompt):
    """Each input has its own virtual tokens: its length decides between two sets of them."""

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        if side not in tensors:
            return {}
        return {0: torch.stack([self.of(tensors[side], n) for n in batch.lengths], dim=1)}

    @staticmethod
    def of(prompts: Tensor, n_tokens: int) -> Tensor:
        return prompts if n_tokens % 2 else prompts.flip(1) * 2  # (P, L, d)


@dataclass(frozen=True)
class AbsentPrompt(SoftPrompt):
    """It puts nothing anywhere."""

    def layers(self, tensors: Tensors, side: Side, batch: Split) -> dict[int, Tensor]:
        return {}


def of_kind(kind: SoftPrompt, prompt: Prompt) -> Prompt:
    return Prompt(kind, prompt.tensors)


@each_model
def test_a_prompt_at_a_layer_that_there_is_not_is_refused(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    split = model.encode(make_examples(3, seed=0))
    [(name, rows)] = three_prompts(model).trained.items()
    prompt = three_prompts(model)
    prompt = Prompt(prompt.kind, {**prompt.tensors, f"{name}.7": rows})
    with pytest.raises(ValueError, match=r"stands at the layers \[0, 7\].* at 2 layers only"):
        model.log_probs(prompt, split)


@pytest.mark.parametrize("side", ["texts", "labels"])
@each_encoder
def test_each_input_can_have_its_own_virtual_tokens(encoder: str, side: Side) -> None:
    dual, sequence = make_dual(encoder), make_sequence(encoder)
    plain, tokenizer = make_encoder(encoder)
    plain.eval()
    examples = make_examples(25, seed=3)  # More than one pass of 64 sequences.
    model = sequence if side == "texts" else dual
    prompt = of_kind(InputPrompt(), hard(model, "wolf new bread", "thing just over", "a the our"))
    names = [Example(label.replace("_", " "), 0) for label in LABELS]
    n_tokens = [len(tokenizer(e.text)["input_ids"]) for e in (*examples, *names)]
    assert {n % 2 for n in n_tokens} == {0, 1}

    def read(prompts: Tensor, example: Example) -> Tensor:
        own = InputPrompt.of(prompts[None], len(tokenizer(example.text)["input_ids"]))[0]
        return features_of_embeddings(plain, tokenizer, own, example)

    split = model.encode(examples)
    if side == "texts":
        expected = [torch.stack([read(p, e) for e in examples]) for p in prompt.words()]
        assert_same(features(sequence, prompt, split), torch.stack(expected))
    else:
        classes = [torch.stack([read(p, e) for e in names]) for p in prompt.words()]
        texts = torch.stack([features_of_tokens(plain, tokenizer, "", e) for e in examples])
        logits = torch.stack([texts @ rows.T / 0.05 for rows in classes])
        with torch.no_grad():
            assert_same(dual.log_probs(prompt, split), F.log_softmax(logits, -1), 1e-4)


@each_model
def test_a_kind_that_puts_nothing_on_a_side_leaves_it(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    split = model.encode(make_examples(3, seed=0))
    prompt = of_kind(AbsentPrompt(), three_prompts(model).with_head(any_head(model)))
    log_probs = model.log_probs(prompt, split)
    assert log_probs.shape == (3, 3, len(LABELS))
    assert_same(log_probs[0], log_probs[2])


# Law: frozen is frozen.


@each_encoder
@each_model
def test_a_stage_leaves_every_weight_bit_identical(model_name: str, encoder: str) -> None:
    model: Any = TASK_MODELS[model_name](encoder)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    split = model.encode(make_examples(9, seed=6))
    start = three_prompts(model)[[0]]
    prompts: list[Prompt] = []
    run = Run(model, start, split, split, observe=lambda e: prompts.append(e.prompt) or False)
    GradientStage(n_steps=2, lr=0.1, eval_every=1).run(run)
    assert not torch.equal(prompts[0].words(), prompts[-1].words())  # It did train.
    after = model.encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_model
def test_gradients_reach_the_prompt_and_nothing_else(model_name: str) -> None:
    model: Any = TASK_MODELS[model_name]()
    split = model.encode(make_examples(6, seed=6))
    prompt = three_prompts(model).map(lambda tensor: tensor.clone().requires_grad_())
    losses(model.log_probs(prompt, split), split.labels).sum().backward()
    for leaf in prompt.tensors.values():
        assert leaf.grad is not None
        assert (leaf.grad.flatten(1).abs().amax(1) > 0).all()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert not any(module.training for module in model.encoder.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_model
def test_half_precision_encoder_trains_a_full_precision_prompt(
    model_name: str, dtype: torch.dtype
) -> None:
    model: Any = TASK_MODELS[model_name]()
    model.encoder.to(dtype)
    split = model.encode(make_examples(6, seed=6))
    start = three_prompts(model)[[0]]
    # Steps so small that they would vanish in half precision.
    steps: list[Tensor] = []
    run = Run(
        model, start, split, split, observe=lambda e: steps.append(e.prompt.words()[0]) or False
    )
    GradientStage(n_steps=1, lr=1e-6, eval_every=1).run(run)
    assert steps[1].dtype == torch.float32
    moved = steps[1] - steps[0]
    assert moved.abs().max() == pytest.approx(1e-6, rel=0.1)
    assert model.log_probs(start, split).dtype == torch.float32


# Evaluation.


@each_model
def test_an_evaluation_is_the_plain_mean_over_examples(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    split = model.encode(make_examples(70, seed=7))  # More than one pass of 64 sequences.
    prompt = three_prompts(model)
    if isinstance(model, SequenceClassifier):
        prompt = model.fresh_head(prompt, split)
    metrics = evaluate(model, prompt, split)
    labels = split.labels.tolist()
    for p in range(len(prompt)):
        with torch.no_grad():
            rows = [model.log_probs(prompt[[p]], split.select([i]))[0, 0] for i in range(70)]
        loss = sum(-float(row[label]) for row, label in zip(rows, labels, strict=True)) / 70
        assert metrics.loss[p] == pytest.approx(loss, rel=1e-5)
        predicted = [int(row.argmax()) for row in rows]
        assert metrics.predictions[p].tolist() == predicted
        hits = [a == b for a, b in zip(predicted, labels, strict=True)]
        assert metrics.accuracy[p] == pytest.approx(sum(hits) / 70)
    if model_name == "sequence":  # Its batches are sorted by length, the predictions are not.
        assert list(split.lengths) != sorted(split.lengths)
        assert len(set(metrics.predictions[0].tolist())) > 1


@each_model
def test_predictions_are_label_indices_on_the_cpu(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    predictions = evaluate(
        model, three_prompts(model), model.encode(make_examples(11, seed=7))
    ).predictions
    assert predictions.shape == (3, 11)
    assert predictions.device.type == "cpu"
    assert not predictions.is_floating_point()


def test_predictions_do_not_depend_on_the_labels() -> None:
    model = make_sequence()
    examples = make_examples(11, seed=7)
    prompt = model.fresh_head(three_prompts(model), model.encode(examples))
    others = [Example(e.text, (e.label + 1) % len(LABELS)) for e in examples]
    one, two = (evaluate(model, prompt, model.encode(rows)) for rows in (examples, others))
    assert torch.equal(one.predictions, two.predictions)
    assert one.accuracy != two.accuracy


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_losses_are_the_mean_of_each_prompt(n_prompts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(n_prompts, 5, 4, generator=generator).log_softmax(-1)
    labels = torch.tensor([3, 0, 1, 1, 2])
    expected = [-sum(float(p[b, c]) for b, c in enumerate(labels)) / 5 for p in log_probs]
    assert losses(log_probs, labels).tolist() == pytest.approx(expected)


# Words, starts and what is refused.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_encoder
def test_embeddings_of_tokens_are_the_models_in_full_precision(
    encoder: str, dtype: torch.dtype
) -> None:
    model = make_dual(encoder)
    model.encoder.to(dtype)
    rows: Any = model.encoder.get_input_embeddings()
    prompts = [(1, 2, 3), (4, 4, 4), (10, 0, 9)]
    together = model.embed(prompts)
    assert (together.shape[:2], together.dtype) == ((3, 3), torch.float32)
    assert not together.requires_grad
    for ids, embeddings in zip(prompts, together, strict=True):
        assert torch.equal(embeddings, rows(torch.tensor(ids)).float())


@each_model
def test_a_start_is_the_embeddings_of_its_words(model_name: str) -> None:
    model = TASK_MODELS[model_name]()
    split = model.encode(make_examples(9, seed=1))
    ids = [(5, 6, 7), (8, 9, 10)]
    one, two = model.start(ids, split), model.start(ids, split)
    assert torch.equal(one.words(), model.embed(ids))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    head = {}
    if isinstance(model, SequenceClassifier):
        head = model.fresh_head(soft(model, model.embed(ids)), split).head
    assert one.head.keys() == head.keys()
    assert all(torch.equal(one.head[name], head[name]) for name in head)


def test_a_start_has_the_kind_that_is_given() -> None:
    model = make_dual()
    split = model.encode(make_examples(3, seed=1))
    assert model.start([(5, 6)], split, InputPrompt()).kind == InputPrompt()


def test_dual_encoder_has_no_head() -> None:
    model = make_dual()
    split = model.encode(make_examples(3, seed=7))
    assert model.start([(5, 6)], split).head == three_prompts(model).head == {}


def no_room_for_prompts() -> None:
    model = make_sequence(max_virtual_tokens=2)
    model.log_probs(three_prompts(model), model.encode(make_examples(3, seed=0)))


def a_token_too_many() -> None:
    model = make_dual()
    model.embed([(1, 2), (0, model.vocab_size)])


def mixed_pairs(model: TaskModel) -> None:
    model.encode([Example("wolf", 0, "bread"), Example("bear there", 0)])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a long prompt": (no_room_for_prompts, "3 virtual tokens.* 2: raise `max_virtual_tokens`"),
    "no room for texts": (
        lambda: make_sequence(max_virtual_tokens=38).encode(make_examples(1, seed=0)),
        "no room for a text is left. Lower `max_virtual_tokens`",
    ),
    "an unknown token": (a_token_too_many, "holds 75, but the model embeds 75 tokens only"),
    "no position": (
        lambda: make_sequence(prompt_position="back"),
        "`prompt_position` must be 'behind_cls' or 'front', got 'back'",
    ),
    "no temperature": (lambda: make_dual(temperature=0.0), "`temperature` must be positive"),
    "a temperature below 0": (
        lambda: make_dual(temperature=-1.0),
        "`temperature` must be positive, got -1.0",
    ),
    "an infinite temperature": (
        lambda: make_dual(temperature=float("inf")),
        "`temperature` must be positive, got inf",
    ),
    "a long label": (
        lambda: DualEncoderClassifier(make_pretrained(), ("food", "wolf_" * 40)),
        "label 'wolf_wolf.*40 positions and leaves none for a prompt: give it a shorter name",
    ),
    "no examples, dual": (lambda: make_dual().encode([]), "`examples` must not be empty"),
    "no examples, sequence": (lambda: make_sequence().encode([]), "`examples` must not be empty"),
    "mixed pairs, dual": (lambda: mixed_pairs(make_dual()), "'bear there' has none"),
    "mixed pairs, sequence": (lambda: mixed_pairs(make_sequence()), "'bear there' has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    do, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        do()


def test_labels_that_read_alike_are_refused() -> None:
    labels = ("wild_animal", "food", "wild animal")
    with pytest.raises(ValueError, match="'wild_animal' and 'wild animal' are read as the same"):
        DualEncoderClassifier(make_pretrained(), labels)
