"""A sentence encoder that compares texts with prompted class names: the recipe of CoOp.

A class is encoded as ``[CLS] prompt name [SEP]``, a text as it is; the logits are their cosines
over a temperature (arXiv 2109.01134, eq. 1, with a text in place of the image). The texts'
features do not depend on the prompt and are computed once, so a step costs ``C`` short sequences
however many examples there are.
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
from optuna_llm_catalyst.prompt_tuning.models.base import mean_pool
from optuna_llm_catalyst.prompt_tuning.models.tokens import class_tokens
from optuna_llm_catalyst.prompt_tuning.models.tokens import encode_texts
from optuna_llm_catalyst.prompt_tuning.models.tokens import max_positions
from optuna_llm_catalyst.prompt_tuning.models.tokens import n_leading_special_tokens
from optuna_llm_catalyst.prompt_tuning.models.tokens import splice_prompts


_ENCODING_BATCH = 128


class DualEncoderClassifier:
    """Classifies by the class name nearest to the text.

    Args:
        encoder:
            A Hugging Face encoder with mean pooling, such as the sentence-transformers models.
            It is frozen in place.
        tokenizer:
            Its tokenizer.
        labels:
            Class names, put behind the prompt; underscores are read as spaces.
        name:
            Name of the pretrained model, for records.
        temperature:
            Divides the cosines; 0.05 is what sentence encoders are commonly trained with.
        max_length:
            Tokens at which texts are cut. Default: what the encoder can take.
    """

    #: All examples at once: a batch costs ``C`` sequences whatever its size.
    batch_size = 4096

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        name: str = "",
        temperature: float = 0.05,
        max_length: int | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        freeze(encoder)
        self.encoder = encoder
        self.labels = tuple(labels)
        self.name = name
        self._tokenizer = tokenizer
        self._temperature = temperature
        self._max_length = max_length
        self._classes = class_tokens(tokenizer, self.labels, self.word_embeddings.device)
        self._offset = n_leading_special_tokens(tokenizer)

    @property
    def word_embeddings(self) -> Tensor:
        weight: Tensor = self.encoder.get_input_embeddings().weight  # type: ignore[operator]
        return weight  # (V, d)

    @property
    def max_virtual_tokens(self) -> int:
        longest = self._classes["input_ids"].shape[1]
        return max_positions(self._tokenizer, self.encoder) - longest

    def evaluation_batch_size(self, n_prompts: int) -> int:
        del n_prompts
        return self.batch_size

    def encode(self, examples: Sequence[Example]) -> EncodedSplit:
        encoded = encode_texts(
            self._tokenizer, examples, self.encoder, max_length=self._max_length
        )
        order = sorted(range(len(encoded)), key=lambda i: encoded.lengths[i])
        parts = [
            self._text_features(encoded.select(order[start : start + _ENCODING_BATCH]))
            for start in range(0, len(order), _ENCODING_BATCH)
        ]
        by_length = torch.cat(parts)  # (B, d)
        features = torch.empty_like(by_length)
        features[order] = by_length
        return EncodedSplit(encoded.labels, {"features": features}, (1,) * len(encoded))

    def fresh_head(self, prompts: Tensor, train: EncodedSplit) -> Head:
        del prompts, train
        return {}

    def logits(self, prompts: Tensor, head: Head, batch: EncodedSplit) -> Tensor:
        del head
        classes = self._class_features(prompts)  # (P, C, d)
        cosines = torch.einsum("bd,pcd->pbc", batch.inputs["features"], classes)
        return cosines / self._temperature  # (P, B, C)

    @torch.no_grad()
    def _text_features(self, batch: EncodedSplit) -> Tensor:
        output = self.encoder(**batch.inputs)
        pooled = mean_pool(output.last_hidden_state, batch.inputs["attention_mask"])
        return F.normalize(pooled, dim=-1)  # (B, d)

    def _class_features(self, prompts: Tensor) -> Tensor:
        embeddings, inputs = splice_prompts(
            prompts, self._classes, self.word_embeddings, offset=self._offset
        )
        output = self.encoder(inputs_embeds=embeddings, **inputs)
        pooled = mean_pool(output.last_hidden_state, inputs["attention_mask"])
        features = F.normalize(pooled, dim=-1)  # (P*C, d)
        return features.view(len(prompts), len(self.labels), -1)  # (P, C, d)
