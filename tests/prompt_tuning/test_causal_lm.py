"""A causal language model as a classifier gives what plain transformers give, word by word."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch import Tensor
import transformers

from optuna_llm_catalyst.prompt_tuning import CausalLMClassifier
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning.models import causal_lm
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models.layers import added
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages import Run
from tests.tokenizer_zoo import byte_level_bpe

from .test_families import COMMON
from .test_families import DECODER
from .test_families import SPECIAL_IDS
from .test_families import unpadded
from .test_masked_lm import assert_a_study_is_used_as_any_other
from .tiny import bert_tokenizer
from .tiny import LABELS
from .tiny import make_examples
from .tiny import tiny_stage


def with_bos() -> Any:
    """As Llama's: a special token in front, and no padding token."""
    tokenizer = bert_tokenizer(token_types=False)
    tokenizer.pad_token = None
    return tokenizer


GEMMA = DECODER | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
#: The class of transformers, its config, and a tokenizer of the kind that it has.
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "gpt2": ("GPT2LMHeadModel", COMMON | SPECIAL_IDS, unpadded),
    "llama": ("LlamaForCausalLM", DECODER, with_bos),
    "qwen3": ("Qwen3ForCausalLM", DECODER, unpadded),
    # Some of its layers see a window only, and its embeddings and logits are scaled.
    "gemma3": ("Gemma3ForCausalLM", GEMMA, with_bos),
}
WORDS: dict[str, dict[str, list[str]]] = {
    "one token": {"wild_animal": ["wolf", "animal"], "food": ["food"], "tool": ["saw"]},
    "several": {
        "wild_animal": ["wild animal", "wolf"],
        "food": ["some good bread"],
        "tool": ["saw"],
    },
}


def make(family: str) -> tuple[Any, Any]:
    """A tiny random causal language model and its tokenizer."""
    kind, config, make_tokenizer = FAMILIES[family]
    config_kind = getattr(transformers, kind).config_class
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config_kind(**config)).float()
        for name, weights in model.named_parameters():
            if name.endswith("bias"):  # Zero at the start of a training: it would not show.
                nn.init.normal_(weights, std=0.1)
    return model.eval(), make_tokenizer()


def classifier(family: str = "gpt2", words: str = "several", **options: Any) -> CausalLMClassifier:
    own = {"verbalizers": WORDS[words], "max_virtual_tokens": 6, "max_length": 12} | options
    return CausalLMClassifier(Pretrained.of(*make(family)), LABELS, **own)


def slowly(
    model: CausalLMClassifier, examples: Sequence[Example], rows: Tensor, *deeper: Tensor
) -> Tensor:
    """Each whole sequence on its own, without a cache or padding: (P, B, C).

    The prompts are embeddings (P, L, d), so that gradients can be compared, too, and what is added
    at the second layer.
    """
    lm, tokenizer = model.pretrained.language_model, model.pretrained.tokenizer
    assert isinstance(lm, nn.Module)
    embed = model.encoder.get_input_embeddings()
    n_bos = int(tokenizer("a")["input_ids"][0] in tokenizer.all_special_ids)

    def score(p: int, text: str, word: str) -> Tensor:
        # Without the [SEP] of these tokenizers.
        ids = tokenizer(f"{text} It was {word}")["input_ids"][:-1]
        n_word = len(tokenizer(word, add_special_tokens=False)["input_ids"])
        own = embed(torch.tensor(ids))
        whole = torch.cat([own[:n_bos], rows[p], own[n_bos:]]).unsqueeze(0)
        changes = {i: change[p : p + 1] for i, change in enumerate(deeper, 1)}
        with added(model._layers, changes, offset=n_bos):
            log_p = lm(inputs_embeds=whole).logits[0].log_softmax(-1)  # (T, V)
        each = [log_p[-n_word - 1 + i, ids[-n_word + i]] for i in range(n_word)]
        return torch.stack(each).mean()

    words = [[tokenizer.decode(ids) for ids in model.verbalizers[label]] for label in LABELS]
    scores = [
        torch.stack([torch.stack([score(p, e.text, w) for w in some]).mean() for some in words])
        for p in range(len(rows))
        for e in examples
    ]
    return torch.stack(scores).log_softmax(-1).view(len(rows), len(examples), -1)


IDS = [[7, 9, 30], [12, 12, 5]]


CASES = [
    *((family, words, "soft") for family in FAMILIES for words in WORDS),
    ("gpt2", "several", "deep"),
    ("llama", "several", "deep"),
]


@pytest.mark.parametrize(("family", "words", "kind"), CASES)
def test_it_is_the_whole_model_on_real_tokens(family: str, words: str, kind: str) -> None:
    """And so are its gradients, which reach the prompt through the cache."""
    model, examples = classifier(family, words), make_examples(4, seed=3)
    split = model.encode(examples)
    start = model.start(IDS, split, {"soft": SOFT, "deep": DeepPrompt()}[kind])
    found, expected = (
        {name: (rows + 0.1 * (rows == 0)).requires_grad_() for name, rows in start.trained.items()}
        for _ in range(2)
    )
    one = model.log_probs(Prompt(start.kind, found), split)
    two = slowly(model, examples, *expected.values())
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    for log_probs in (one, two):
        log_probs[..., 0].sum().backward()
    for name, rows in found.items():
        assert rows.grad is not None and rows.grad.abs().max() > 0
        torch.testing.assert_close(rows.grad, expected[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("words", WORDS)
def test_padding_pushes_no_text_out_of_a_layers_window(words: str) -> None:
    """A short text beside one that is longer than the window of some layers."""
    model = classifier("gemma3", words, max_length=30)
    texts = ["bread wolf", "the saw " * 10, "bread", "some water"]
    examples = [Example(text, 0) for text in texts]
    split = model.encode(examples)
    assert len(IDS[0]) + min(split.lengths) < GEMMA["sliding_window"] < max(split.lengths) + 3
    prompt = model.start(IDS, split)
    expected = slowly(model, examples, prompt.words())
    found = model.log_probs(prompt, split)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def log_probs_of(model: CausalLMClassifier, split: Split) -> Tensor:
    return model.log_probs(model.start(IDS, split), split)


@pytest.mark.parametrize("words", WORDS)
def test_many_texts_at_once_are_one_at_a_time(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no pass grows with the prompts, the texts or the labels' words."""
    model = classifier("llama", words)
    split = model.encode(make_examples(7, seed=3))
    together = log_probs_of(model, split)
    alone = torch.cat([log_probs_of(model, split.select([i])) for i in range(7)], 1)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(causal_lm, "_MAX_SEQUENCES", 3)
    sizes: list[int] = []
    model.encoder.register_forward_hook(lambda _, args, out: sizes.append(len(out[0])))
    torch.testing.assert_close(log_probs_of(model, split), together, atol=1e-4, rtol=1e-4)
    assert max(sizes) <= 3


@pytest.mark.parametrize(
    ("words", "n_passes", "sequences"), [("one token", 1, 8), ("several", 2, 24)]
)
def test_the_prefix_is_read_once(words: str, n_passes: int, sequences: int) -> None:
    """The meter counts both passes; the head is evaluated where it must be only."""
    model = classifier("gpt2", words)
    split = model.encode(make_examples(4, seed=3))
    seen: list[tuple[int, ...]] = []
    model._words.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    start = model.start(IDS, split).map(lambda rows: rows.requires_grad_())
    with model.metered() as passes:
        model.log_probs(start, split).sum().backward()
    assert passes == Passes(n_passes, n_passes, sequences)
    # Of `several`, words of two and three tokens have three further tokens.
    assert seen == ([(8, 4)] if n_passes == 1 else [(8, model.vocab_size), (24, model.vocab_size)])
    own = [p for p in model._words.parameters() if id(p) not in ids_of(model.pretrained)]
    assert sum(p.numel() for p in own) == (4 * 32 if n_passes == 1 else 0)


def ids_of(pretrained: Pretrained) -> set[int]:
    assert pretrained.language_model is not None
    return set(map(id, pretrained.language_model.parameters()))


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_prompt_of_it_can_be_trained(kind: str) -> None:
    model = classifier("qwen3")
    train = model.encode(make_examples(12, seed=1))
    start = model.start([[7, 9, 30]], train, {"soft": SOFT, "deep": DeepPrompt()}[kind])
    language_model = model.pretrained.language_model
    assert language_model is not None
    weights = {name: tensor.clone() for name, tensor in language_model.state_dict().items()}
    for stage in (
        tiny_stage(n_steps=6),
        BlackBoxStage(n_queries=21, population_size=5, intrinsic_dim=9, alpha=0.3),
    ):
        assert stage.run(Run(model, start, train, train)).best.step > 0
    after = language_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert all(weight.grad is None for weight in language_model.parameters())


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_search_takes_steps_as_wide_as_the_prefix_varies(kind: str) -> None:
    """Further tokens of words are no part of it."""
    spreads = []
    for words in WORDS:
        model = classifier("llama", words)
        split = model.encode(make_examples(4, seed=3))
        start = model.start(IDS[:1], split, {"soft": SOFT, "deep": DeepPrompt()}[kind])
        spreads.append(model.spreads(start, split))
    assert spreads[0] == pytest.approx(spreads[1]) and min(spreads[0].values()) > 0


def test_a_long_text_is_cut_and_the_template_is_not() -> None:
    model = classifier("llama")
    split = model.encode([Example("bread " * 200, 0), Example("bread", 0)])
    assert split.lengths == (12 + 3, 1 + 3)  # With [CLS] and without [SEP].
    assert split.rows("attention_mask").sum(1).tolist() == [15, 4]
    model = classifier("llama", max_length=100)
    (length,) = model.encode([Example("bread " * 200, 0)]).lengths
    assert 0 <= model._n_positions - 6 - 2 - length <= 1
    split = model.encode([Example("bread " * 200, 0)])
    prompt = model.start([[7] * 6], split)
    assert model.log_probs(prompt, split).isfinite().all()


def test_a_text_of_characters_of_many_tokens_is_cut_to_the_room_that_is_there() -> None:
    """A character that is cut in two would be all of its tokens again."""
    tokenizer = byte_level_bpe()
    config = COMMON | SPECIAL_IDS | {"vocab_size": len(tokenizer)}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    for n_before in range(4):
        made = CausalLMClassifier(
            Pretrained.of(model, tokenizer), ["topic", "answer"], max_virtual_tokens=4
        )
        text = "." * n_before + "日本語" * 40
        split = made.encode([Example(text, 0)])
        assert made.log_probs(made.start([IDS[0]], split), split).isfinite().all()
        room = made._n_positions - made.placement.max_virtual_tokens - made._n_further
        assert room - 3 <= split.lengths[0] <= room


def test_both_texts_of_a_pair_are_read() -> None:
    model = classifier(template="{text} and {text_pair} it was")
    one, two = (model.encode([Example("bread", 0, text)]) for text in ("wolf", "saw"))
    assert not torch.allclose(log_probs_of(model, one), log_probs_of(model, two))


@pytest.mark.parametrize("template", ["{text} It was", "{text} It was ", "Of {text}\nThis:\n"])
def test_words_are_tokens_as_they_stand_behind_the_template(template: str) -> None:
    """Of a vocabulary in which a word behind a space is another token than one behind none."""
    tokenizer = byte_level_bpe()
    config = COMMON | SPECIAL_IDS | {"vocab_size": len(tokenizer)}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    made = CausalLMClassifier(
        Pretrained.of(model, tokenizer),
        ["the_answer", "topic"],
        template=template,
        max_virtual_tokens=4,
    )
    joint = "" if template.endswith("\n") else " "
    for label, name in (("the_answer", "the answer"), ("topic", "topic")):
        (ids,) = made.verbalizers[label]
        assert tokenizer.decode(ids) == joint + name
        prefix = template.rstrip(" ").format(text="Ask.")
        whole = tokenizer(f"{prefix}{joint}{name}")["input_ids"]
        assert whole == tokenizer(prefix)["input_ids"] + ids


def test_a_study_of_it_is_used_as_any_other(tmp_path: Path) -> None:
    assert_a_study_is_used_as_any_other(
        CausalLMClassifier, make("gpt2"), WORDS["several"], tmp_path
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"template": "It was"}, "`template` must have {text} and may .*each once"),
    "two texts": ({"template": "{text} {text}"}, "each once"),
    "a blank": ({"template": "{text} {mask}"}, "`template` may have {text} and {text_pair} only"),
    "a number": ({"template": "{text} {0}"}, "`template` may have"),
    "a label less": ({"verbalizers": {"food": ["food"]}}, "must have words for each of"),
    "the same words": (
        {"verbalizers": {**WORDS["several"], "food": WORDS["several"]["tool"]}},
        "The labels 'food' and 'tool' have the same words",
    ),
    "no words": ({"verbalizers": {**WORDS["several"], "food": []}}, "must have words for each of"),
    "an empty word": (
        {"verbalizers": {**WORDS["several"], "food": [" "]}},
        "is the tokens \\[\\]",
    ),
    "an unknown word": (
        {"verbalizers": {**WORDS["several"], "food": ["xyz"]}},
        "'xyz' behind the template '{text} It was' is the tokens .*UNK.*: name another",
    ),
    "no length": ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
    "no room": (
        {"max_virtual_tokens": 36},
        "36 for the prompt and 5 for the template and its words",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_a_pair_needs_a_template_for_pairs() -> None:
    with pytest.raises(ValueError, match="has a second text, which does not fit the template"):
        classifier().encode([Example("bread", 0, "wolf")])


def test_other_models_are_refused() -> None:
    model, tokenizer = make("gpt2")
    with pytest.raises(ValueError, match='load_pretrained\\(name, head="causal-lm"\\)'):
        CausalLMClassifier(Pretrained.of(model.base_model, tokenizer), LABELS)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**COMMON)).eval()
    with pytest.raises(ValueError, match="BertModel cannot .*does not read from left to right"):
        CausalLMClassifier(Pretrained.of(bert, tokenizer), LABELS, max_virtual_tokens=6)
