"""An encoder that reads prompt and text together, with a linear head on top.

The prompt stands before the text at ``inputs_embeds`` (prompt tuning, arXiv 2104.08691), the
hidden states are mean-pooled, and a linear head, trained with the prompt, gives the logits.

A fresh head is not random: it is the logistic regression on the frozen features under the
restart prompt. A prompt can then be judged before it is trained, and the first steps do not
distort it for the sake of a head that knows nothing (arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.base import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models.base import freeze
from optuna_llm_catalyst.prompt_tuning.models.base import Head
from optuna_llm_catalyst.prompt_tuning.models.base import losses
from optuna_llm_catalyst.prompt_tuning.models.base import mean_pool
from optuna_llm_catalyst.prompt_tuning.models.tokens import encode_texts
from optuna_llm_catalyst.prompt_tuning.models.tokens import n_leading_special_tokens
from optuna_llm_catalyst.prompt_tuning.models.tokens import splice_prompts


_EVALUATION_SEQUENCES = 64
_PROBE_L2 = 0.1
_PROBE_STEPS = 50


class SequenceClassifier:
    """Classifies with a linear head on an encoder that reads the prompt and the text.

    Args:
        encoder: A Hugging Face encoder that takes ``inputs_embeds``. It is frozen in place.
        tokenizer: Its tokenizer.
        labels: Label names.
        name: Name of the pretrained model, for records.
        max_length: Tokens at which texts are cut, besides the prompt.
        max_virtual_tokens: Positions kept free for the prompt.
    """

    batch_size = 16

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        name: str = "",
        max_length: int = 128,
        max_virtual_tokens: int = 64,
    ) -> None:
        freeze(encoder)
        self.encoder = encoder
        self.labels = tuple(labels)
        self.name = name
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.max_virtual_tokens = max_virtual_tokens
        self._offset = n_leading_special_tokens(tokenizer)

    @property
    def word_embeddings(self) -> Tensor:
        weight: Tensor = self.encoder.get_input_embeddings().weight  # type: ignore[operator]
        return weight  # (V, d)

    def evaluation_batch_size(self, n_prompts: int) -> int:
        # Each prompt reads each text: the sequences at once are what memory is spent on.
        return max(1, _EVALUATION_SEQUENCES // n_prompts)

    def encode(self, examples: Sequence[Example]) -> EncodedSplit:
        return encode_texts(
            self._tokenizer,
            examples,
            self.encoder,
            max_length=self._max_length,
            n_reserved=self.max_virtual_tokens,
        )

    def fresh_head(self, prompts: Tensor, train: EncodedSplit) -> Head:
        order = sorted(range(len(train)), key=lambda i: train.lengths[i])
        size = self.evaluation_batch_size(len(prompts))
        with torch.no_grad():
            parts = [
                self._features(prompts, train.select(order[i : i + size]))
                for i in range(0, len(order), size)
            ]
        features = torch.cat(parts, dim=1)  # (P, B, d)
        return _probe(features, train.labels[order], len(self.labels))

    def logits(self, prompts: Tensor, head: Head, batch: EncodedSplit) -> Tensor:
        features = self._features(prompts, batch)  # (P, B, d)
        return _linear(features, head)  # (P, B, C)

    def _features(self, prompts: Tensor, batch: EncodedSplit) -> Tensor:
        n_prompts, length, _ = prompts.shape
        if length > self.max_virtual_tokens:
            raise ValueError(
                f"The prompt has {length} virtual tokens, the model keeps room for "
                f"{self.max_virtual_tokens}: raise `max_virtual_tokens`."
            )
        embeddings, inputs = splice_prompts(
            prompts, batch.inputs, self.word_embeddings, offset=self._offset
        )
        output = self.encoder(inputs_embeds=embeddings, **inputs)
        pooled = mean_pool(output.last_hidden_state, inputs["attention_mask"])
        # Unit scale for every entry, whatever scale the encoder has: the probe's penalty and the
        # head's learning rate then mean the same for all encoders.
        width = pooled.shape[-1]  # Not that of `prompts` where embeddings are narrow (ALBERT).
        scaled: Tensor = F.normalize(pooled, dim=-1) * width**0.5  # (P*B, d)
        return scaled.view(n_prompts, len(batch), width)  # (P, B, d)


def _linear(features: Tensor, head: Head) -> Tensor:
    return torch.einsum("pbd,pcd->pbc", features, head["weight"]) + head["bias"].unsqueeze(1)


@torch.enable_grad()
def _probe(features: Tensor, labels: Tensor, n_labels: int) -> Head:
    """L2-regularised logistic regressions, one a prompt, fitted at once.

    Args:
        features: Features of shape ``(P, B, d)``.
        labels: Label indices of shape ``(B,)``.
        n_labels: ``C``.
    """
    n_prompts, _, width = features.shape
    # An encoder's features have a large common part, along which weight and bias are hard to tell
    # apart: without it the fit converges in its few steps. The minimum is the same.
    centre = features.mean(1, keepdim=True)  # (P, 1, d)
    features = features - centre
    weight = torch.zeros(n_prompts, n_labels, width, device=features.device)
    bias = torch.zeros(n_prompts, n_labels, device=features.device)
    weight.requires_grad_()
    bias.requires_grad_()
    head = {"weight": weight, "bias": bias}
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The regressions share no variable: the sum's minimum is each one's minimum.
        objective = losses(_linear(features, head), labels).sum()
        objective = objective + _PROBE_L2 / 2 * weight.square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return {"weight": weight, "bias": bias - torch.einsum("pcd,pbd->pc", weight, centre)}
