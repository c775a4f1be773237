"""A token is what the model embeds, for every family of encoders."""

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
from transformers import PreTrainedTokenizerFast

from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning.models.tokens import check_embeds
from optuna_llm_catalyst.prompt_tuning.models.tokens import embed_tokens
from optuna_llm_catalyst.prompt_tuning.models.tokens import encode_texts
from optuna_llm_catalyst.prompt_tuning.models.tokens import max_positions
from optuna_llm_catalyst.prompt_tuning.models.tokens import n_leading_special_tokens
from optuna_llm_catalyst.prompt_tuning.models.tokens import splice_prompts

from . import tiny
from .tiny import bert_tokenizer
from .tiny import N_POSITIONS
from .tiny import roberta_tokenizer
from .tiny import VOCABULARY


#: The names that most configs have. The weights are large, so that a wrong position shows.
COMMON = {
    "vocab_size": 4 + len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "max_position_embeddings": N_POSITIONS,
}
DECODER = COMMON | {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
ROBERTA = COMMON | {"max_position_embeddings": N_POSITIONS + 2, "pad_token_id": 1}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BART = {
    **SPECIAL_IDS,
    "vocab_size": COMMON["vocab_size"],
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": N_POSITIONS,
    "init_std": 0.3,
    "scale_embedding": True,
}
T5 = {"vocab_size": COMMON["vocab_size"], "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2}
T5 |= {"num_heads": 2, "initializer_factor": 1.0}
XLNET = {"vocab_size": COMMON["vocab_size"], "d_model": 32, "n_layer": 2, "n_head": 2}
XLNET |= {"d_inner": 64, "initializer_range": 0.3}
DISTILBERT = {"vocab_size": COMMON["vocab_size"], "dim": 32, "n_layers": 2, "n_heads": 2}
DISTILBERT |= {"hidden_dim": 64, "max_position_embeddings": N_POSITIONS, "initializer_range": 0.3}
XGLM = {"vocab_size": COMMON["vocab_size"], "d_model": 32, "num_layers": 2, "ffn_dim": 64}
XGLM |= {"attention_heads": 2, "max_position_embeddings": N_POSITIONS, "init_std": 0.3}


def bert() -> PreTrainedTokenizerFast:
    return bert_tokenizer(token_types=True)


def plain() -> PreTrainedTokenizerFast:
    return bert_tokenizer(token_types=False)


def headless() -> PreTrainedTokenizerFast:
    return bert_tokenizer(token_types=False, leading="")


def unpadded() -> PreTrainedTokenizerFast:
    """It has no padding token, and pads on the left where it has to."""
    tokenizer = headless()
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    return tokenizer


Row = tuple[str, dict[str, Any], Callable[[], PreTrainedTokenizerFast]]
#: The class of transformers, its config, and a tokenizer of the kind that it has.
FAMILIES: dict[str, Row] = {
    "albert": ("Albert", COMMON | {"embedding_size": 16}, bert),
    "bert": ("Bert", COMMON, bert),
    "camembert": ("Camembert", ROBERTA, roberta_tokenizer),
    "data2vec-text": ("Data2VecText", ROBERTA, roberta_tokenizer),
    "deberta-v2": (
        "DebertaV2",
        COMMON | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        bert,
    ),
    "distilbert": ("DistilBert", DISTILBERT, plain),
    "electra": ("Electra", COMMON | {"embedding_size": 16}, bert),
    "gemma3": ("Gemma3Text", DECODER, unpadded),
    "llama": ("Llama", DECODER, unpadded),
    "longformer": ("Longformer", ROBERTA | {"attention_window": 8}, roberta_tokenizer),
    "modernbert": ("ModernBert", COMMON | SPECIAL_IDS | {"sep_token_id": 3}, plain),
    "mpnet": ("MPNet", ROBERTA, roberta_tokenizer),
    "qwen3": ("Qwen3", DECODER, unpadded),
    "roberta": ("Roberta", ROBERTA, roberta_tokenizer),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", ROBERTA, roberta_tokenizer),
    "xglm": ("XGLM", XGLM | SPECIAL_IDS, unpadded),
    "xlm-roberta": ("XLMRoberta", ROBERTA, roberta_tokenizer),
    "xlm-roberta-xl": ("XLMRobertaXL", ROBERTA, roberta_tokenizer),
    "xlnet": ("XLNet", XLNET, headless),
    "xmod": ("Xmod", ROBERTA | {"default_language": "en_XX"}, roberta_tokenizer),
    "rembert": ("RemBert", COMMON | {"input_embedding_size": 16}, bert),
}


def make(name: str, config: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = name.removesuffix("Encoder")
        model = getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{kind}Config")(**config)
        )
    return model.eval().float()


def family(name: str) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    if name == "bart encoder":
        return make("Bart", BART).get_encoder(), plain()
    if name == "t5 encoder":
        return make("T5Encoder", T5), headless()
    kind, config, tokenizer = FAMILIES[name]
    return make(kind, config), tokenizer()


ALL = [*FAMILIES, "bart encoder", "t5 encoder"]
PROMPT = ["hammer", "wolf", "##s"]
TEXTS = ["the bread", "a long way down that apple find", "soup"]


def tokenize(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    examples = [Example(text, 0) for text in texts]
    split = encode_texts(tokenizer, examples, encoder, max_length=None)
    return {name: field.rows for name, field in split.fields.items()}


@torch.no_grad()
def hidden(encoder: nn.Module, **inputs: Any) -> Tensor:
    return encoder(**inputs).last_hidden_state


@pytest.mark.parametrize("name", ALL)
def test_virtual_tokens_made_of_known_tokens_equal_them(name: str) -> None:
    encoder, tokenizer = family(name)
    check_embeds(encoder, tokenizer)
    tokens = tokenize(encoder, tokenizer, TEXTS)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    embedded = embed_tokens(encoder, ids)
    rest = {key: rows for key, rows in tokens.items() if key != "input_ids"}
    known = mask.bool()
    expected = hidden(encoder, **tokens)
    got = hidden(encoder, inputs_embeds=embedded, **rest)
    torch.testing.assert_close(got[known], expected[known], atol=1e-4, rtol=1e-4)

    offset = n_leading_special_tokens(tokenizer)
    prompt = torch.tensor([tokenizer.convert_tokens_to_ids(PROMPT)])  # (1, L)
    spread = prompt.expand(len(TEXTS), -1)
    together = torch.cat([ids[:, :offset], spread, ids[:, offset:]], dim=1)
    virtual = embed_tokens(encoder, prompt).unsqueeze(0)  # (1, 1, L, d)
    spliced, inputs = splice_prompts(virtual, tokens, embedded, offset=offset)
    known = inputs["attention_mask"].bool()
    assert known.sum() == mask.sum() + spread.numel()
    expected = hidden(encoder, input_ids=together, **inputs)
    got = hidden(encoder, inputs_embeds=spliced, **inputs)
    torch.testing.assert_close(got[known], expected[known], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name: str) -> None:
    encoder, tokenizer = family(name)
    together = tokenize(encoder, tokenizer, TEXTS)
    states = hidden(encoder, **together)
    for i, text in enumerate(TEXTS):
        expected = hidden(encoder, **tokenize(encoder, tokenizer, [text]))
        got = states[i : i + 1, : expected.shape[1]]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_text_fills_all_positions_that_there_are(name: str) -> None:
    encoder, tokenizer = family(name)
    limit = max_positions(tokenizer, encoder)
    assert limit == (512 if name in {"xlnet", "t5 encoder"} else N_POSITIONS)
    longest = tokenize(encoder, tokenizer, ["bread " * 600])
    assert longest["input_ids"].shape == (1, limit)
    assert hidden(encoder, **longest).isfinite().all()


def clip_text() -> nn.Module:
    return make("CLIPText", COMMON | SPECIAL_IDS)


#: Models that cannot take a soft prompt, and what the message must say.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no embeddings": (clip_text, "CLIPTextModel cannot take a soft prompt.*specify input_ids"),
    "a T5 with decoder": (lambda: make("T5", T5), "T5Model cannot.*take its encoder"),
    "a BART with decoder": (lambda: make("Bart", BART), "BartModel cannot.*take its encoder"),
    "ids beside embeddings": (
        lambda: make("Esm", ROBERTA | {"mask_token_id": 3}),
        "EsmModel .* does more",
    ),
    "embeddings that crash": (lambda: make("IBert", ROBERTA), "IBertModel cannot take"),
    "no encoder at all": (lambda: nn.Linear(2, 2), "Linear cannot take a soft prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_inputs_embeds_is_refused_by_name(case: str) -> None:
    make_encoder, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        check_embeds(make_encoder(), roberta_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("leading", "expected"), [("", 0), ("[CLS] ", 1), ("[CLS] [SEP] ", 2)])
def test_an_unknown_word_is_no_leading_special_token(
    leading: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "VOCABULARY", VOCABULARY[1:])  # Without "a".
    tokenizer = bert_tokenizer(token_types=False, leading=leading)
    assert n_leading_special_tokens(tokenizer) == expected


def test_the_check_leaves_no_trace() -> None:
    encoder, tokenizer = family("bert")
    before = torch.random.get_rng_state()
    check_embeds(encoder, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(weights.grad is None for weights in encoder.parameters())


@pytest.mark.parametrize("case", [("T5", T5, "T5EncoderModel"), ("Bart", BART, "BartEncoder")])
def test_of_an_encoder_decoder_folder_the_encoder_is_loaded(
    case: tuple[str, dict[str, Any], str], tmp_path: Path
) -> None:
    name, config, encoder_class = case
    model, tokenizer = make(name, config), headless()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert type(loaded.encoder).__name__ == encoder_class
    tokens = tokenize(loaded.encoder, tokenizer, TEXTS)
    expected = hidden(model.get_encoder(), **tokens)
    assert torch.equal(hidden(loaded.encoder.eval(), **tokens), expected)
    check_embeds(loaded.encoder, loaded.tokenizer)
