"""The head of a language model, for some of its hidden states and some words of its vocabulary."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class WordHead(nn.Module):
    """The logits of a few words, or of all, as the language model itself would give them.

    It is the model's own head, with the rows of these words in place of all rows of its last
    layer, and hidden states in place of the encoder.

    Args:
        language_model: A Hugging Face model with a head over the vocabulary.
        token_ids: The words, by token id; None for the whole vocabulary, whose weights are shared
            with the model.

    Raises:
        ValueError: If the model's last layer is not a linear one.
    """

    def __init__(self, language_model: Any, token_ids: list[int] | None) -> None:
        super().__init__()
        last = language_model.get_output_embeddings()
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f"{type(language_model).__name__} gives its words' logits by "
                f"{type(last).__name__}, not by a linear layer: its head cannot be cut."
            )
        rows = last if token_ids is None else _rows(last, token_ids)
        # What the head does between the encoder and its last layer differs from family to family.
        shared = {id(language_model.base_model): _Given(), id(last): rows}
        self._head = copy.deepcopy(language_model, shared).eval().requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, d) to logits (N, number of words)."""
        logits: Tensor = self._head(inputs_embeds=hidden.unsqueeze(1)).logits  # (N, 1, words)
        return logits.squeeze(1)


def _rows(last: nn.Linear, token_ids: list[int]) -> nn.Linear:
    """Some rows of a linear layer."""
    rows = nn.Linear(last.in_features, len(token_ids), bias=last.bias is not None)
    index = torch.tensor(token_ids, device=last.weight.device)
    rows.weight = nn.Parameter(last.weight.detach()[index].clone())
    if last.bias is not None:
        rows.bias = nn.Parameter(last.bias.detach()[index].clone())
    return rows


class _Given(nn.Module):
    """Stands where the encoder was, and takes embeddings for its hidden states."""

    @property
    def decoder(self) -> _Given:
        """OPT asks its encoder for a decoder within it."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """What any language model looks for in its encoder's output."""

    global_attentions = None
    cache_params = None
