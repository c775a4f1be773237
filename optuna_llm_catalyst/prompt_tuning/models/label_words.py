"""What language models share that read a label by its words, in or behind a template."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import json

import torch
import torch.nn.functional as F

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models import templates
from optuna_llm_catalyst.prompt_tuning.models.encoder import PromptedEncoder
from optuna_llm_catalyst.prompt_tuning.models.templates import Verbalizers
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained


class LabelWordsClassifier(PromptedEncoder):
    """A frozen language model, a template, and words for each label.

    Args:
        pretrained: A language model with its head. It is frozen in place.
        labels: Label names.
        template: What the model reads behind the prompt.
        verbalizers: The words of each label, also as JSON; by default the labels' own names.
        max_length: Tokens at which a text is cut, the template besides.
        max_virtual_tokens: Positions kept free for the prompt.

    Raises:
        ValueError: If the model has no head, a label no words, or a text no room.
    """

    batch_size = 16
    _pools = False

    def __init__(
        self,
        pretrained: Pretrained,
        labels: Sequence[str],
        *,
        template: str,
        verbalizers: Verbalizers | str | None,
        max_length: int,
        max_virtual_tokens: int,
    ) -> None:
        if pretrained.language_model is None:
            raise ValueError(
                f"{pretrained.name} comes without a head over its vocabulary: load it with "
                f'load_pretrained(name, head="{self.head}").'
            )
        super().__init__(pretrained)
        if not self._tokenizer.is_fast:  # Texts are cut at the ends of tokens.
            raise ValueError(f"The tokenizer of {pretrained.name} is no fast one.")
        self.pretrained = pretrained
        self.labels = tuple(labels)
        self.template = template
        words = templates.words_of(labels, verbalizers)
        #: The words of each label, each a list of token ids.
        self.verbalizers = {label: [self._ids_of(w) for w in words[label]] for label in labels}
        _check_distinct(self.verbalizers)
        self._word_ids = sum(self.verbalizers.values(), [])
        # A label's score is the mean of its words'.
        rows = [i for i, label in enumerate(labels) for _ in self.verbalizers[label]]
        means = F.one_hot(torch.tensor(rows), len(labels)).float()
        self._means = (means / means.sum(0)).to(self.device)  # (words, C)
        self.settings: dict[str, float | str | None] = {
            "template": template,
            "verbalizers": json.dumps(words),
            "max_length": max_length,
            "max_virtual_tokens": max_virtual_tokens,
        }
        described = json.dumps([template, sorted(self.verbalizers.items())])
        self.fingerprint += f":{hashlib.sha256(described.encode()).hexdigest()[:8]}"
        self.placement = self._placed(("texts",), max_virtual_tokens)
        check_at_least(2, max_length=max_length)  # One token of each text of a pair.
        self._text_room = min(max_length, self._free_positions())

    def _ids_of(self, word: str) -> list[int]:
        """The token ids of a word where the template has it."""
        raise NotImplementedError

    def _template_fields(self) -> dict[str, str]:
        """What stands in the template besides texts."""
        return {}

    def _filled(self, example: Example) -> Example:
        """What the model reads of an example, as one text."""
        fields = self._template_fields()
        text = templates.filled(self.template, example, self._tokenizer, self._text_room, **fields)
        return Example(text, example.label)

    def _free_positions(self) -> int:
        """Positions for a text, beside the prompt, the template and the longest word."""
        around = self.template.format(text="", text_pair="", **self._template_fields())
        used = len(self._tokenizer(around)["input_ids"]) + self._n_further
        n_virtual = self.placement.max_virtual_tokens
        free = self._n_positions - n_virtual - used
        if free < 2:
            raise ValueError(
                f"The encoder has {self._n_positions} positions: {n_virtual} for the prompt and "
                f"{used} for the template and its words leave no room for a text. Lower "
                "`max_virtual_tokens`, or shorten `template`."
            )
        return free

    @property
    def _n_further(self) -> int:
        """Tokens of the longest word behind its first."""
        return max(map(len, self._word_ids)) - 1


def _check_distinct(verbalizers: dict[str, list[list[int]]]) -> None:
    """Raises a ValueError if two labels have the same words: no text could tell them apart."""
    seen: dict[frozenset[tuple[int, ...]], str] = {}
    for label, words in verbalizers.items():
        if (other := seen.setdefault(frozenset(map(tuple, words)), label)) != label:
            raise ValueError(
                f"The labels {other!r} and {label!r} have the same words: give one of them "
                "others in `verbalizers`."
            )
