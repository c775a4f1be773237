"""Texts to token tensors, and soft prompts into the middle of them.

The only place that knows how a tokenizer frames a text with special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.base import EncodedSplit


def encode_texts(
    tokenizer: Any,
    examples: Sequence[Example],
    encoder: nn.Module,
    *,
    max_length: int | None,
    n_reserved: int = 0,
) -> EncodedSplit:
    """Tokenises examples with their special tokens, padded on the right to the longest.

    Args:
        tokenizer: A Hugging Face tokenizer.
        examples: The examples.
        encoder: The encoder, which knows how many positions it has and where it lives.
        max_length: Tokens at which a text is cut; None for all that the encoder can take.
        n_reserved: Positions to leave for a prompt.
    """
    if not examples:
        raise ValueError("`examples` must not be empty.")
    pairs = [example.text_pair for example in examples]
    if any(pairs) and not all(pairs):
        single = next(example.text for example in examples if not example.text_pair)
        raise ValueError(
            f"Some examples have a `text_pair`, {single[:60]!r} has none: give all of them one."
        )
    limit = max_positions(tokenizer, encoder) - n_reserved
    if limit <= n_special_tokens(tokenizer):
        raise ValueError(
            f"The encoder has {limit + n_reserved} positions, of which {n_reserved} are kept for "
            "the prompt: no room for a text is left. Lower `max_virtual_tokens`."
        )
    encoded = tokenizer(
        [example.text for example in examples],
        pairs if any(pairs) else None,
        truncation=True,
        max_length=limit if max_length is None else min(limit, max_length),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    device = next(encoder.parameters()).device
    return EncodedSplit(
        labels=torch.tensor([example.label for example in examples], device=device),
        inputs={name: tensor.to(device) for name, tensor in encoded.items()},
        lengths=tuple(encoded["attention_mask"].sum(1).tolist()),
    )


def n_special_tokens(tokenizer: Any) -> int:
    """Special tokens that frame a pair of texts."""
    return int(tokenizer.num_special_tokens_to_add(pair=True))


def class_tokens(tokenizer: Any, labels: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Class names with their special tokens, padded on the right: ``(C, T)`` each."""
    names = [label.replace("_", " ") for label in labels]
    encoded = tokenizer(names, padding=True, padding_side="right", return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in encoded.items()}


def n_leading_special_tokens(tokenizer: Any) -> int:
    """1 if the tokenizer starts every text with a special token, as BERT's ``[CLS]``, else 0."""
    first = tokenizer("a")["input_ids"][0]
    return int(first in tokenizer.all_special_ids)


def splice_prompts(
    prompts: Tensor, tokens: Mapping[str, Tensor], word_embeddings: Tensor, *, offset: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Puts every prompt in front of every text, behind its leading special token.

    Positions are left to the encoder, which counts them over the whole sequence.

    Args:
        prompts: Prompts of shape ``(P, L, d)``.
        tokens: ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, ``(N, T)`` each.
        word_embeddings: The input embeddings, ``(V, d)``.
        offset: How many tokens stay in front of the prompt.

    Returns:
        Embeddings of shape ``(P*N, L+T, d)``, prompt by prompt, in the encoder's precision, and
        the other inputs that belong to them.
    """
    n_prompts, length, _ = prompts.shape
    n_texts = tokens["input_ids"].shape[0]
    texts = word_embeddings[tokens["input_ids"]]  # (N, T, d)
    texts = texts.unsqueeze(0).expand(n_prompts, -1, -1, -1)  # (P, N, T, d)
    spread = prompts.to(texts.dtype).unsqueeze(1).expand(-1, n_texts, -1, -1)  # (P, N, L, d)
    embeddings = torch.cat([texts[:, :, :offset], spread, texts[:, :, offset:]], dim=2)
    inputs = {}
    for name in ("attention_mask", "token_type_ids"):
        if name in tokens:
            rows = tokens[name]  # (N, T)
            # The prompt is always attended to and belongs to the segment it stands in.
            filler = rows[:, :1].expand(-1, length)
            with_prompt = torch.cat([rows[:, :offset], filler, rows[:, offset:]], dim=1)
            inputs[name] = with_prompt.repeat(n_prompts, 1)  # (P*N, L+T)
    return embeddings.flatten(0, 1), inputs


def max_positions(tokenizer: Any, encoder: nn.Module) -> int:
    """Tokens that the encoder can take at most."""
    config: Any = encoder.config
    positions = getattr(config, "max_position_embeddings", None) or 512
    # RoBERTa counts positions from `padding_idx + 1`: its table holds two rows more than usable.
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
        positions -= 2
    return int(min(positions, getattr(tokenizer, "model_max_length", positions)))
