"""What a stage trains: prompt embeddings that start at the embeddings of real words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch import Tensor


class SoftPrompt(nn.Module):
    """``L`` trainable embeddings in front of a frozen model (arXiv 2104.08691).

    Kept in float32 whatever the frozen model's precision is: steps of a learning rate of 1e-3
    vanish in half precision.

    Args:
        embeddings: Where to start, of shape ``(L, d)``; copied.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        if embeddings.ndim != 2:
            raise ValueError(
                f"`embeddings` must have shape (L, d), got {tuple(embeddings.shape)}."
            )
        start = embeddings.detach().to(torch.float32, copy=True)
        self.embeddings = nn.Parameter(start)  # (L, d)

    @staticmethod
    def from_token_ids(token_ids: Sequence[int], word_embeddings: Tensor) -> SoftPrompt:
        """The soft prompt that is exactly these tokens.

        Args:
            token_ids: ``L`` token ids.
            word_embeddings: The model's input embeddings, of shape ``(V, d)``.
        """
        return SoftPrompt(embed([token_ids], word_embeddings)[0])

    def forward(self) -> Tensor:
        return self.embeddings  # (L, d)


def embed(token_ids: Sequence[Sequence[int]], word_embeddings: Tensor) -> Tensor:
    """The embeddings of ``P`` hard prompts in float32, of shape ``(P, L, d)``."""
    index = torch.tensor([list(ids) for ids in token_ids], device=word_embeddings.device)
    n_rows = word_embeddings.shape[0]
    if index.numel() and int(index.max()) >= n_rows:
        raise ValueError(
            f"`token_ids` holds {int(index.max())}, but the model embeds {n_rows} tokens only: "
            "do tokenizer and model belong together?"
        )
    return word_embeddings.detach()[index].to(torch.float32)  # (P, L, d)
