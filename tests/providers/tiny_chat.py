"""A chat model of a few kilobytes that gives one reply, by construction: nothing is learnt.

The reply is cut into pieces that are all different, one token each, so that each token of it
follows from the one before alone. The weights say so: an embedding is a one-hot vector, the layers
add nothing to it, and the head has a large weight from each token to the next one.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import Tokenizer
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

from tests.toy_stage import reply


GOOD = reply("calm answer")
N_POSITIONS = 128
#: The logit of the next token is this high, and that of all others is zero.
_LOGIT = 36.0
_PIECES = ('{"', "prompts", '":', ' ["', "calm", " answer", '"]', "}")
_SPECIALS = ("<pad>", "<end>", "<user>", "<assistant>", "<think>")
#: Tokens of the reply, its end included.
N_REPLY = len(_PIECES) + 1
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def save(folder: Path) -> Path:
    """Saves the model and its tokenizer as the hub has them."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # As the models of the hub recommend themselves: none of it may warn or draw numbers.
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, what a chat is put together with, and the pieces of the reply."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A blank is written as Ġ among bytes; without merges no text is encoded to a piece.
    pieces = [piece.replace(" ", "Ġ") for piece in _PIECES if piece not in alphabet]
    vocabulary = {token: i for i, token in enumerate((*_SPECIALS, *alphabet, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=list(_SPECIALS[2:]),
        chat_template=CHAT_TEMPLATE,
        pad_token="<pad>",
        eos_token="<end>",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that gives the reply after ``<assistant>``."""
    size = 2 * len(tokenizer)  # Twice, as an attention head's size must be even.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=N_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    names = ["<assistant>", *(piece.replace(" ", "Ġ") for piece in _PIECES), "<end>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight.zero_()
        # The norm before the head makes a one-hot vector this much longer.
        model.lm_head.weight[ids[1:], ids[:-1]] = _LOGIT / size**0.5
    return model
