"""Reading on behind prefixes that were read once: their keys and values serve every word."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch import Tensor

from optuna_llm_catalyst.exceptions import first_line


#: Names in configs of how far back some layers see: Gemma 3 and Mistral, Llama 4, GPT-Neo.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


def read_on(encoder: nn.Module, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Hidden states of ``K`` continuations of each of ``N`` prefixes, ``(N*K, m, d)``.

    Padding stands between a short prefix and what follows: it is hidden, and positions count on
    from the last real token. Gradients reach the prefixes through the cache.

    Args:
        encoder: A causal language model without its head.
        ids: The continuations' tokens, ``(K, m)``.
        mask: Which tokens of the prefixes are no padding, ``(N, T)``, padded on the right.
        cache: What the encoder kept of the prefixes. It stays as it is.
    """
    (n, _), (k, length) = mask.shape, ids.shape
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    repeated.batch_repeat_interleave(k)
    known = torch.cat([mask, mask.new_ones(n, length)], 1)  # (N, T+m)
    positions = mask.sum(1, keepdim=True) + torch.arange(length, device=mask.device)  # (N, m)
    hidden: Tensor = encoder(
        input_ids=ids.repeat(n, 1),
        attention_mask=known.repeat_interleave(k, 0),
        position_ids=positions.repeat_interleave(k, 0),
        past_key_values=repeated,
        use_cache=True,
    ).last_hidden_state
    return hidden


def window_of(encoder: nn.Module) -> int | None:
    """How many tokens its layers see back at least, padding included; None for all of them."""
    config: Any = encoder.config
    sizes = (getattr(config.get_text_config(), name, None) for name in _WINDOWS)
    return min((size for size in sizes if isinstance(size, int)), default=None)


@torch.no_grad()
def check_causal(encoder: nn.Module, *, reads_on: bool) -> None:
    """Raises unless a model reads from left to right and, where it must, on from a cache.

    Args:
        encoder: A language model without its head, in eval mode.
        reads_on: Whether words of several tokens need the cache.
    """
    ids = torch.arange(4, device=next(encoder.parameters()).device).unsqueeze(0)
    mask = torch.tensor([[1, 1, 0]], device=ids.device)  # The third token is padding.
    try:
        whole = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        prefix = encoder(input_ids=ids[:, :3], attention_mask=mask, use_cache=reads_on)
        if not _is_close(prefix.last_hidden_state[:, :2], whole[:, :2]):
            raise ValueError("it does not read from left to right")
        if reads_on:
            behind = read_on(encoder, ids[:, 2:], mask, prefix.past_key_values)
            if not _is_close(behind, whole[:, 2:]):
                raise ValueError("it does not read on from a cache as it reads the whole")
    # A model may be anybody's, and raises what it likes.
    except Exception as error:
        what = "words of several tokens" if reads_on else "words"
        raise ValueError(
            f"{type(encoder).__name__} cannot score {what} behind a text ({first_line(error)})."
        ) from error


def _is_close(one: Tensor, two: Tensor) -> bool:
    """Whether two ways to calculate come to the same in this precision."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    scale = two.abs().max().item()
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance * scale)
