"""A sentence encoder that compares texts with prompted class names: the recipe of CoOp.

A class is encoded as ``[CLS] prompt name [SEP]``, a text as it is; the logits are their cosines
over a temperature (arXiv 2109.01134, eq. 1, with a text in place of the image). The texts'
features do not depend on the prompt and are computed once, so a step costs ``C`` short sequences
however many examples there are.

A prompt may stand before the texts, too. While it is trained, every step encodes its batch of
texts; once it is kept, the features under it are computed once, as those of plain texts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import math

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.label_names import LabelNamesEncoder
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import is_of
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Split


_MAX_TEXTS = 128


class DualEncoderClassifier(LabelNamesEncoder):
    """Classifies by the class name nearest to the text.

    Args:
        pretrained:
            A sentence encoder with its tokenizer and its pooling, from ``load_pretrained``. It is
            frozen in place.
        labels:
            Class names, put behind the prompt; underscores are read as spaces.
        temperature:
            Divides the cosines; 0.05 is what sentence encoders are commonly trained with.
        max_length:
            Tokens at which texts are cut. Default: what the encoder can take.
        max_virtual_tokens:
            Positions of a text that are kept free for a prompt before it; at most half of them.

    Raises:
        ValueError: If the encoder cannot read a prompt, or a class name leaves no room for one.
    """

    mechanism = (
        "Each label is read as `<prompt> <label>`, and a text gets the label whose reading is "
        "nearest to it."
    )

    def __init__(
        self,
        pretrained: Pretrained,
        labels: Sequence[str],
        *,
        temperature: float = 0.05,
        max_length: int | None = None,
        max_virtual_tokens: int = 64,
    ) -> None:
        super().__init__(pretrained, labels)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.settings = {
            "temperature": temperature,
            "max_length": max_length,
            "max_virtual_tokens": max_virtual_tokens,
        }
        self._temperature = temperature
        self._max_length = max_length
        self._n_reserved = min(max_virtual_tokens, self._n_positions // 2)
        self.placement = self._placed(
            ("labels", "texts"), self._label_room, {"texts": self._n_reserved}
        )

    @property
    def scale(self) -> float:
        """What the cosines are multiplied by."""
        return 1 / self._temperature

    @property
    def max_text_tokens(self) -> int:
        """Tokens at which texts are cut, special tokens included."""
        room = self._n_positions - self._n_reserved
        return room if self._max_length is None else min(room, self._max_length)

    @torch.no_grad()
    def encode(self, examples: Sequence[Example], *, under: Prompt | None = None) -> Split:
        """Examples to features, once.

        Args:
            examples: The examples.
            under: A prompt (``P = 1``) that stands before each text and no longer changes.

        Returns:
            A split with the features, of shape ``(B, d)``. Without ``under`` it holds the texts'
            tokens, too, for prompts that are trained before them.
        """
        tokens = self._tokenize(examples, max_length=self._max_length, n_reserved=self._n_reserved)
        if under is None:
            features = Field(tokens.encodings())  # (B, d)
            return replace(tokens, fields={**tokens.fields, "features": features})
        pooled = self._features(tokens, under, "texts", max_sequences=_MAX_TEXTS)
        features = Field(F.normalize(pooled[0], dim=-1))
        return Split(tokens.examples, tokens.labels, {"features": features}, tokens.lengths)

    def _example_features(self, prompt: Prompt, batch: Split) -> Tensor:
        if not any(is_of(name, "texts") for name in prompt.tensors):
            return super()._example_features(prompt, batch)
        if "input_ids" not in batch.fields:
            raise ValueError(
                "These texts were encoded under a prompt that no longer changes, so another one "
                "cannot stand before them: encode them without `under`."
            )
        features = self._features(_tokens(batch), prompt, "texts", max_sequences=_MAX_TEXTS)
        return F.normalize(features, dim=-1)

    def _sequences(self, side: Side, batch: Split) -> Split:
        return super()._sequences(side, _tokens(batch))


def _tokens(batch: Split) -> Split:
    """A batch of texts without the features that they have without a prompt."""
    return replace(batch, fields={n: f for n, f in batch.fields.items() if n != "features"})
