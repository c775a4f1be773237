"""Labels whose names are read behind a prompt, and examples whose features are compared with them.

A class is encoded as ``[CLS] prompt name [SEP]``; the logits are the cosines of its features and
an example's, times a scale (CoOp, arXiv 2109.01134, eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models.encoder import PromptedEncoder
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.split import Split


_MAX_CLASSES = 256


class LabelNamesEncoder(PromptedEncoder):
    """What task models share that read the names of labels behind a prompt.

    Args:
        pretrained: The encoder that reads them, its tokenizer and its pooling.
        labels: Class names; underscores are read as spaces.

    Raises:
        ValueError: If a name fills all positions, or two are read as the same tokens.
    """

    #: A training batch costs ``C`` sequences whatever its size.
    batch_size = 4096

    def __init__(self, pretrained: Pretrained, labels: Sequence[str]) -> None:
        super().__init__(pretrained)
        self.labels = tuple(labels)
        self._classes = self._encode_classes()

    @property
    def scale(self) -> float:
        """What the cosines are multiplied by."""
        raise NotImplementedError

    @property
    def _label_room(self) -> int:
        """The longest prompt that fits before every name."""
        return self._n_positions - max(self._classes.lengths)

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        examples = self._example_features(prompt, batch)  # (P or 1, B, d)
        cosines = examples @ self.class_features(prompt).mT  # (P, B, C)
        return F.log_softmax(cosines * self.scale, dim=-1)

    def class_features(self, prompt: Prompt | None) -> Tensor:
        """Unit features of the labels' names under prompts, or of the names alone: (P, C, d)."""
        features = self._features(self._classes, prompt, "labels", max_sequences=_MAX_CLASSES)
        return F.normalize(features, dim=-1)

    def text_features(self, split: Split) -> Tensor:
        """Unit features of a split's examples, of shape ``(n, d)``."""
        return split.rows("features")

    def _example_features(self, prompt: Prompt, batch: Split) -> Tensor:
        """Unit features of a batch under prompts, or of the batch alone: (P or 1, B, d)."""
        del prompt
        return batch.rows("features").unsqueeze(0)

    def _sequences(self, side: Side, batch: Split) -> Split:
        return super()._sequences(side, self._classes if side == "labels" else batch)

    def _encode_classes(self) -> Split:
        """The class names as tokens, whole: a name that is cut could be another's."""
        names = [Example(label.replace("_", " "), i) for i, label in enumerate(self.labels)]
        classes = self._tokenize(names, max_length=None)
        longest = max(range(len(names)), key=classes.lengths.__getitem__)
        if classes.lengths[longest] >= self._n_positions:
            raise ValueError(
                f"The label {self.labels[longest][:60]!r} fills all of the encoder's "
                f"{self._n_positions} positions and leaves none for a prompt: give it a "
                "shorter name."
            )
        read: dict[tuple[int, ...], str] = {}
        for label, row in zip(self.labels, classes.rows("input_ids").tolist(), strict=True):
            if (other := read.setdefault(tuple(row), label)) != label:
                raise ValueError(
                    f"The labels {other!r} and {label!r} are read as the same tokens: rename one."
                )
        return classes
