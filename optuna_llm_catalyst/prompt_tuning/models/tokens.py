"""Texts to token tensors, and soft prompts into the middle of them.

The only place that knows how a tokenizer frames a text with special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Split


#: For encoders without a limit of their own.
_DEFAULT_POSITIONS = 512


def embed_tokens(encoder: Any, ids: Tensor) -> Tensor:
    """Token ids (…) as the encoder itself embeds them, (…, d).

    Some embedding modules scale their rows (Gemma 3, XGLM, BART): a row of the matrix is not
    what such an encoder sees.
    """
    embedded: Tensor = encoder.get_input_embeddings()(ids)
    return embedded


def check_embeds(encoder: nn.Module, tokenizer: Any) -> None:
    """Raises unless embeddings can stand in for token ids, of an encoder in eval mode."""
    rest = _tokenize(tokenizer, encoder, ["a b c"])
    ids = rest.pop("input_ids")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            by_id = encoder(input_ids=ids, **rest).last_hidden_state
            embedded = embed_tokens(encoder, ids)
            by_embedding = encoder(inputs_embeds=embedded, **rest).last_hidden_state
        # SigLIP's text tower fills all of its positions.
        if len(by_id) != len(ids) or by_id.shape[1] < ids.shape[1]:
            raise ValueError("it gives no hidden state for each token")
        scale = by_id.abs().max().item()
        if not torch.allclose(by_id, by_embedding, rtol=1e-3, atol=1e-3 * scale):
            raise ValueError("it does more with token ids than embed them")
    # An encoder may be anybody's, and raises what it likes.
    except Exception as error:
        hint = ""
        if getattr(getattr(encoder, "config", None), "is_encoder_decoder", False):
            hint = "; take its encoder: `model.get_encoder()`"
        if hasattr(encoder, "get_image_features"):
            hint = "; for images take CLIPClassifier (--model-type clip)"
        raise ValueError(
            f"{type(encoder).__name__} cannot take a soft prompt, because embeddings cannot "
            f"replace its token ids ({first_line(error)}){hint}."
        ) from error


def encode_texts(
    tokenizer: Any,
    examples: Sequence[Example],
    encoder: nn.Module,
    *,
    max_length: int | None,
    n_reserved: int = 0,
) -> Split:
    """Tokenises examples with their special tokens, padded on the right to the longest.

    A text is cut at ``max_length`` tokens, and where the encoder's positions end, of which
    ``n_reserved`` are left for a prompt.
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
    if limit <= tokenizer.num_special_tokens_to_add(pair=True):
        raise ValueError(
            f"The encoder has {limit + n_reserved} positions, of which {n_reserved} are kept for "
            "the prompt: no room for a text is left. Lower `max_virtual_tokens`."
        )
    inputs = _tokenize(
        tokenizer,
        encoder,
        [example.text for example in examples],
        pairs if any(pairs) else None,
        truncation=True,
        max_length=limit if max_length is None else min(limit, max_length),
    )
    mask = inputs["attention_mask"]
    return Split(
        examples=tuple(examples),
        labels=torch.tensor([example.label for example in examples], device=mask.device),
        fields={name: Field(rows, pad_axis=1) for name, rows in inputs.items()},
        lengths=tuple(mask.sum(1).tolist()),
    )


def _tokenize(
    tokenizer: Any,
    encoder: nn.Module,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Texts to tensors (N, T) on the encoder's device, padded on the right.

    Tokenizers pad on either side, and those without a padding token refuse to: it is done here.
    """
    encoded = tokenizer(list(texts), pairs, return_attention_mask=True, **options)
    fill = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }
    device = next(encoder.parameters()).device
    return {
        name: pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in encoded[name]],
            batch_first=True,
            padding_value=padding,
        ).to(device)
        for name, padding in fill.items()
        if name in encoded
    }


def n_leading_special_tokens(tokenizer: Any) -> int:
    """Special tokens in front of every text, such as BERT's ``[CLS]``."""
    return _special_tokens_mask(tokenizer).index(0)


def n_trailing_special_tokens(tokenizer: Any) -> int:
    """Special tokens behind every text, such as BERT's ``[SEP]``."""
    return _special_tokens_mask(tokenizer)[::-1].index(0)


def _special_tokens_mask(tokenizer: Any) -> list[int]:
    return list(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])


def without_end(split: Split, n_tokens: int) -> Split:
    """Texts without so many tokens at their ends."""
    lengths = tuple(length - n_tokens for length in split.lengths)
    mask = split.rows("attention_mask")
    ends = torch.tensor(lengths, device=mask.device).unsqueeze(1)  # (N, 1)
    kept = (torch.arange(mask.shape[1], device=mask.device) < ends).to(mask.dtype)
    fields = {**split.fields, "attention_mask": Field(kept, pad_axis=1)}
    return replace(split, fields=fields, lengths=lengths).select(range(len(split)))


def splice_prompts(
    prompts: Tensor, tokens: Mapping[str, Tensor], embedded: Tensor, *, offset: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Puts every prompt in front of every text, behind its leading special token.

    Positions are left to the encoder, which counts them over the whole sequence.

    Args:
        prompts: Virtual tokens, ``(P, 1, L, d)``, or ``(P, N, L, d)`` if each text has its own.
        tokens: What the encoder reads of the texts, ``(N, T)`` each.
        embedded: Their tokens as :func:`embed_tokens` gives them, ``(N, T, d)``.
        offset: How many tokens stay in front of the prompt.

    Returns:
        Embeddings ``(P*N, L+T, d)`` in the encoder's precision, and what else it reads.
    """
    n_prompts, _, length, _ = prompts.shape
    texts = embedded.unsqueeze(0).expand(n_prompts, -1, -1, -1)  # (P, N, T, d)
    spread = prompts.to(texts.dtype).expand(-1, len(embedded), -1, -1)  # (P, N, L, d)
    embeddings = torch.cat([texts[:, :, :offset], spread, texts[:, :, offset:]], dim=2)
    inputs = {}
    for name in tokens.keys() - {"input_ids"}:
        rows = tokens[name]  # (N, T)
        # The prompt is always attended to and belongs to the segment it stands in.
        filler = rows[:, :1].expand(-1, length)
        with_prompt = torch.cat([rows[:, :offset], filler, rows[:, offset:]], dim=1)
        inputs[name] = with_prompt.repeat(n_prompts, 1)  # (P*N, L+T)
    return embeddings.flatten(0, 1), inputs


def max_positions(tokenizer: Any, encoder: nn.Module) -> int:
    """Tokens that the encoder can take at most."""
    config = getattr(encoder, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions < 1:  # XLNet says -1, T5 says nothing: their positions are relative.
        positions = _DEFAULT_POSITIONS
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings"):
            # RoBERTa and its kin count positions from behind the padding's.
            padding = getattr(module, "padding_idx", None)
            positions -= 0 if padding is None else padding + 1
            break
    return int(min(positions, tokenizer.model_max_length))
