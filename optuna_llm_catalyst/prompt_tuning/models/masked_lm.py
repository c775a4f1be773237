"""A masked language model that fills a blank with the labels' words.

The model reads ``[CLS] prompt text It was [MASK]. [SEP]``, and a label's logit is the mean of its
words' logits at the mask (LM-BFF, arXiv 2012.15723; BBT, 2201.03514). The head is evaluated at the
mask and for these words alone: the same logits as those of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models import templates
from optuna_llm_catalyst.prompt_tuning.models.label_words import LabelWordsClassifier
from optuna_llm_catalyst.prompt_tuning.models.lm_head import WordHead
from optuna_llm_catalyst.prompt_tuning.models.templates import Verbalizers
from optuna_llm_catalyst.prompt_tuning.pretrained import Head
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Split


_MAX_SEQUENCES = 64
DEFAULT_TEMPLATE = "{text} It was {mask}."


class MaskedLMClassifier(LabelWordsClassifier):
    """Classifies by the words that fill the blank of a template.

    Args:
        pretrained: A masked language model, of ``load_pretrained(name, head="masked-lm")``. It is
            frozen in place.
        labels: Label names.
        template: What the model reads behind the prompt, with ``{text}``, ``{mask}`` and, for
            pairs, ``{text_pair}``, once each.
        verbalizers: The words of each label, each one token of the vocabulary; by default the
            label's name with underscores read as spaces. A text is read as JSON: so settings
            keep them.
        max_length: Tokens at which a text is cut, the template besides.
        max_virtual_tokens: Positions kept free for the prompt.

    Raises:
        ValueError: If the model has no head, a template lacks a field, or a word is no token.
    """

    mechanism = (
        "A masked language model reads `<prompt> <text>` and a sentence with a blank; a text gets "
        "the label whose word fills the blank best."
    )
    head: Head = "masked-lm"
    _unread = frozenset({"mask_at"})

    def __init__(
        self,
        pretrained: Pretrained,
        labels: Sequence[str],
        *,
        template: str = DEFAULT_TEMPLATE,
        verbalizers: Verbalizers | str | None = None,
        max_length: int = 128,
        max_virtual_tokens: int = 64,
    ) -> None:
        if pretrained.tokenizer.mask_token is None:
            raise ValueError(f"The tokenizer of {pretrained.name} has no mask token.")
        super().__init__(
            pretrained,
            labels,
            template=templates.checked(template, "text", "mask"),
            verbalizers=verbalizers,
            max_length=max_length,
            max_virtual_tokens=max_virtual_tokens,
        )
        self._words = WordHead(pretrained.language_model, [ids[0] for ids in self._word_ids])

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Split:
        filled = [self._filled(example) for example in examples]
        n_reserved = self.placement.max_virtual_tokens
        split = self._tokenize(filled, max_length=None, n_reserved=n_reserved)
        is_mask = split.rows("input_ids") == self._tokenizer.mask_token_id  # (B, T)
        for example, n in zip(examples, is_mask.sum(1).tolist(), strict=True):
            if n != 1:
                what = "holds the mask token itself" if n else "leaves no room for the mask"
                raise ValueError(f"The text {example.text[:60]!r} {what}: change it.")
        fields = {**split.fields, "mask_at": Field(is_mask.int().argmax(1))}
        found = Split(tuple(examples), split.labels, fields, split.lengths)
        return self._with_encodings(found)  # At the blank.

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        self._check_length(prompt)
        hidden = self._features(batch, prompt, "texts", max_sequences=_MAX_SEQUENCES)
        logits = self._words(hidden.flatten(0, 1)).float() @ self._means  # (P*B, C)
        return F.log_softmax(logits.view(*hidden.shape[:2], -1), dim=-1)

    def _pool(self, hidden: Tensor, attention_mask: Tensor, batch: Split) -> Tensor:
        """The hidden states at the masks, behind the prompt that was put in front of them."""
        n_prompts = len(hidden) // len(batch)
        length = hidden.shape[1] - batch.rows("input_ids").shape[1]
        at = (batch.rows("mask_at") + length).repeat(n_prompts)  # (P*b,)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]

    def _template_fields(self) -> dict[str, str]:
        return {"mask": self._tokenizer.mask_token}

    def _ids_of(self, word: str) -> list[int]:
        """The one token of a word inside a sentence."""
        tried: dict[str, Any] = {}
        for text in (f" {word}", word):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id:
                return [int(ids[0])]
            tried[text] = self._tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"The word {word!r} is the tokens {tried[word]}, not one: name another in "
            "`verbalizers`, such as a shorter word of the same meaning."
        )
