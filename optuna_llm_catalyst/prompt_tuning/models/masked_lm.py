"""A masked language model that fills a blank with the labels' words.

The model reads ``[CLS] prompt text It was [MASK]. [SEP]``, and a label's logit is the mean of its
words' logits at the mask (LM-BFF, arXiv 2012.15723; BBT, 2201.03514). The head is evaluated at the
mask and for these words alone: the same logits as those of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import json
from typing import Any

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.encoder import PromptedEncoder
from optuna_llm_catalyst.prompt_tuning.models.lm_head import WordHead
from optuna_llm_catalyst.prompt_tuning.pretrained import Head
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Split


_MAX_SEQUENCES = 64
DEFAULT_TEMPLATE = "{text} It was {mask}."


class MaskedLMClassifier(PromptedEncoder):
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

    batch_size = 16
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
        verbalizers: Mapping[str, Sequence[str]] | str | None = None,
        max_length: int = 128,
        max_virtual_tokens: int = 64,
    ) -> None:
        if pretrained.language_model is None:
            raise ValueError(
                f"{pretrained.name} comes without a head over its vocabulary: load it with "
                'load_pretrained(name, head="masked-lm").'
            )
        super().__init__(pretrained)
        if self._tokenizer.mask_token is None:
            raise ValueError(f"The tokenizer of {pretrained.name} has no mask token.")
        if not self._tokenizer.is_fast:  # Texts are cut at the ends of tokens.
            raise ValueError(f"The tokenizer of {pretrained.name} is no fast one.")
        self.pretrained = pretrained
        self.labels = tuple(labels)
        self.template = _checked(template)
        words = json.loads(verbalizers) if isinstance(verbalizers, str) else verbalizers
        words = words or own_words(labels)
        if words.keys() != set(labels) or not all(words.values()):
            raise ValueError(
                f"`verbalizers` must have words for each of {', '.join(labels)}, got "
                f"{dict(words)!r}."
            )
        #: The words of each label, by token id.
        self.verbalizers = {label: [self._token_of(w) for w in words[label]] for label in labels}
        self._words = WordHead(pretrained.language_model, sum(self.verbalizers.values(), []))
        # A label's logit is the mean of its words'.
        rows = [i for i, label in enumerate(labels) for _ in self.verbalizers[label]]
        means = F.one_hot(torch.tensor(rows), len(labels)).float()
        self._means = (means / means.sum(0)).to(self.device)  # (words, C)
        self.settings: dict[str, float | str | None] = {
            "template": template,
            "verbalizers": json.dumps({label: list(words[label]) for label in labels}),
            "max_length": max_length,
            "max_virtual_tokens": max_virtual_tokens,
        }
        described = json.dumps([template, sorted(self.verbalizers.items())])
        self.fingerprint += f":{hashlib.sha256(described.encode()).hexdigest()[:8]}"
        around = template.format(text="", text_pair="", mask=self._tokenizer.mask_token)
        used = len(self._tokenizer(around)["input_ids"])
        self._text_room = min(max_length, self._n_positions - max_virtual_tokens - used)
        if self._text_room < 2:
            raise ValueError(
                f"The encoder has {self._n_positions} positions: {max_virtual_tokens} for the "
                f"prompt and {used} for the template leave no room for a text. Lower "
                "`max_virtual_tokens`, or shorten `template`."
            )
        self.placement = self._placed(("texts",), max_virtual_tokens)

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Split:
        filled = [Example(self._filled(example), example.label) for example in examples]
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

    def _encoding_width(self) -> int:
        config: Any = self.encoder.config
        return int(config.hidden_size)

    def _filled(self, example: Example) -> str:
        """The template with a text that leaves room for the rest of it."""
        pair = example.text_pair
        if ("{text_pair}" in self.template) != (pair is not None):
            has = "has no second text" if pair is None else "has a second text"
            raise ValueError(
                f"The example {example.text[:60]!r} {has}, which does not fit the template "
                f"{self.template!r}: {{text_pair}} stands for it there."
            )
        room = self._text_room if pair is None else self._text_room // 2
        return self.template.format(
            text=self._cut(example.text, room),
            text_pair=self._cut(pair or "", room),
            mask=self._tokenizer.mask_token,
        )

    def _cut(self, text: str, n_tokens: int) -> str:
        """The start of a text, of so many tokens."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in found["offset_mapping"]]
        return text if len(ends) <= n_tokens else text[: ends[n_tokens - 1]]

    def _token_of(self, word: str) -> int:
        """The one token of a word inside a sentence."""
        tried: dict[str, Any] = {}
        for text in (f" {word}", word):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id:
                return int(ids[0])
            tried[text] = self._tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"The word {word!r} is the tokens {tried[word]}, not one: name another in "
            "`verbalizers`, such as a shorter word of the same meaning."
        )


def own_words(labels: Sequence[str]) -> dict[str, list[str]]:
    """The words that stand for labels unless others are given: their names."""
    return {label: [label.replace("_", " ")] for label in labels}


def _checked(template: str) -> str:
    counts = [template.count(field) for field in ("{text}", "{mask}", "{text_pair}")]
    if counts[:2] != [1, 1] or counts[2] > 1:
        raise ValueError(
            f"`template` must have {{text}} and {{mask}} and may have {{text_pair}}, each once, "
            f"got {template!r}."
        )
    try:
        template.format(text="", text_pair="", mask="")
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"`template` may have {{text}}, {{text_pair}} and {{mask}} only, got {template!r}."
        ) from error
    return template
