"""An encoder that reads prompt and text together, with a linear head on top.

The prompt stands before the text at ``inputs_embeds`` (prompt tuning, arXiv 2104.08691): behind
the ``[CLS]``, as words of the text would, or in front of the whole sequence, as PEFT has it. The
hidden states are pooled, and a linear head, trained with the prompt, gives the logits.

A fresh head is not random: it is the logistic regression on the frozen features under the
restart prompt. A prompt can then be judged before it is trained, and the first steps do not
distort it for the sake of a head that knows nothing (arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args
from typing import Literal

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.base import SOFT
from optuna_llm_catalyst.prompt_tuning.models.encoder import PromptedEncoder
from optuna_llm_catalyst.prompt_tuning.models.head import fit_heads
from optuna_llm_catalyst.prompt_tuning.models.head import linear
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.split import Split


#: Behind the text's leading special token, or in front of it.
PromptPosition = Literal["behind_cls", "front"]
_MAX_SEQUENCES = 64


class SequenceClassifier(PromptedEncoder):
    """Classifies with a linear head on an encoder that reads the prompt and the text.

    Args:
        pretrained: An encoder with its tokenizer and its pooling, from ``load_pretrained``. It is
            frozen in place.
        labels: Label names.
        max_length: Tokens at which texts are cut, besides the prompt.
        max_virtual_tokens: Positions kept free for the prompt.
        prompt_position: ``behind_cls``, or ``front`` for prompts that :func:`write_peft` can
            export. The pooling reads the whole sequence: in front, ``cls`` pools the first
            virtual token. A prompt that was trained in one position is refused in the other.

    Attributes:
        pretrained: The encoder with its tokenizer and its pooling.
        prompt_position: Where the prompt stands.
        max_text_tokens: Tokens at which texts are really cut, special tokens included.

    Raises:
        ValueError: If the encoder cannot read a prompt, or there is no such position.
    """

    batch_size = 16
    mechanism = (
        "The encoder reads `<prompt> <text>`, and a linear layer that is trained with the prompt "
        "reads the label from that."
    )

    def __init__(
        self,
        pretrained: Pretrained,
        labels: Sequence[str],
        *,
        max_length: int = 128,
        max_virtual_tokens: int = 64,
        prompt_position: PromptPosition = "behind_cls",
    ) -> None:
        super().__init__(pretrained)
        if prompt_position not in get_args(PromptPosition):
            raise ValueError(
                f"`prompt_position` must be 'behind_cls' or 'front', got {prompt_position!r}."
            )
        self.pretrained = pretrained
        self.labels = tuple(labels)
        self.prompt_position = prompt_position
        if prompt_position == "front":
            self._offset = 0
            self.fingerprint += ":front"
        self.settings: dict[str, float | str | None] = {
            "max_length": max_length,
            "max_virtual_tokens": max_virtual_tokens,
            "prompt_position": prompt_position,
        }
        self.max_text_tokens = min(max_length, self._n_positions - max_virtual_tokens)
        self._max_length = max_length
        self.placement = self._placed(("texts",), max_virtual_tokens)

    def encode(self, examples: Sequence[Example]) -> Split:
        return self._tokenize(
            examples,
            max_length=self._max_length,
            n_reserved=self.placement.max_virtual_tokens,
        )

    def start(
        self, token_ids: Sequence[Sequence[int]], train: Split, kind: PromptKind = SOFT
    ) -> Prompt:
        return self.fresh_head(super().start(token_ids, train, kind), train)

    @torch.no_grad()
    def fresh_head(self, prompt: Prompt, train: Split) -> Prompt:
        """The prompts with heads that are fitted to the frozen encoder under them."""
        features = self.prompted_features(prompt, train)
        return prompt.with_head(fit_heads(features, train.labels, len(self.labels)))

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        logits = linear(self.prompted_features(prompt, batch), prompt.head)
        return F.log_softmax(logits, dim=-1)  # (P, B, C)

    def text_features(self, split: Split) -> Tensor:
        """Unit features of a split's texts without a prompt, of shape ``(n, d)``."""
        return split.encodings()

    def prompted_features(self, prompt: Prompt, batch: Split) -> Tensor:
        """What the head reads of each text under each prompt, of shape ``(P, B, d)``."""
        self._check_length(prompt)
        pooled = self._features(batch, prompt, "texts", max_sequences=_MAX_SEQUENCES)
        # Unit scale for every entry, whatever scale the encoder has: the head's penalty and its
        # learning rate then mean the same for all encoders.
        scaled: Tensor = F.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5
        return scaled  # (P, B, d)
