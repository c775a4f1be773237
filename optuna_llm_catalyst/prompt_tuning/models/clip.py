"""CLIP and SigLIP: an image gets the label whose prompted name is nearest to it.

This is CoOp's recipe (arXiv 2109.01134). A class is read as ``<prompt> <name>`` by the text tower.
An image is read by the image tower, once, since no prompt changes its features. The logits are
the cosines of both times the model's own logit scale. SigLIP adds a bias to them, which is the
same for all labels: it cancels in the softmax and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.data.images import read_image
from optuna_llm_catalyst.prompt_tuning.models import meter
from optuna_llm_catalyst.prompt_tuning.models.label_names import LabelNamesEncoder
from optuna_llm_catalyst.prompt_tuning.pretrained import Head
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.towers import TextTower


_MAX_IMAGES = 32


class CLIPClassifier(LabelNamesEncoder):
    """Classifies images by the class name nearest to them.

    The text of an example is the path of an image. Prompts stand before the names of labels only.

    Args:
        pretrained:
            A CLIP or SigLIP model, of ``load_pretrained(name, head="clip")``. Both towers are
            frozen in place.
        labels: Class names, put behind the prompt; underscores are read as spaces.

    Raises:
        ValueError: If the model has no image tower, or a class name leaves no room for a prompt.
    """

    mechanism = (
        "Each label is read as `<prompt> <label>`, and an image gets the label whose reading is "
        "nearest to it."
    )
    head: Head = "clip"
    reads_images = True

    def __init__(self, pretrained: Pretrained, labels: Sequence[str]) -> None:
        if pretrained.image_tower is None:
            raise ValueError(
                f"{pretrained.name} comes without an image tower: load it with "
                'load_pretrained(name, head="clip").'
            )
        super().__init__(pretrained, labels)
        self._image_tower = pretrained.image_tower
        self._image_tower.model.eval().requires_grad_(False)
        self._scale = self._image_tower.scale
        self.settings: dict[str, float | str | None] = {}
        self.placement = self._placed(("labels",), self._label_room)

    @property
    def scale(self) -> float:
        """What the cosines are multiplied by: the model's own logit scale."""
        return self._scale

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Split:
        """Images to features, once.

        Args:
            examples: Examples with the path of an image as their text.

        Raises:
            DataError: If a path leads to no image.
            ValueError: If there is no example, or one has a second text.
        """
        if not examples:
            raise ValueError("`examples` must not be empty.")
        if pair := next((e for e in examples if e.text_pair is not None), None):
            raise ValueError(
                f"The example {pair.text[:60]!r} has a second text, but each is one image."
            )
        starts = range(0, len(examples), _MAX_IMAGES)
        features = torch.cat([self._read(examples[i : i + _MAX_IMAGES]) for i in starts])
        labels = torch.tensor([example.label for example in examples], device=self.device)
        fields = {"features": Field(F.normalize(features, dim=-1))}  # (B, d)
        return Split(tuple(examples), labels, fields, (1,) * len(examples))

    def _read(self, examples: Sequence[Example]) -> Tensor:
        """Features (b, d) of one batch of images."""
        meter.count(self.encoder, len(examples))
        return self._image_tower(read_image(example.text) for example in examples)

    def _pool(self, hidden: Tensor, attention_mask: Tensor, batch: Split) -> Tensor:
        assert isinstance(self.encoder, TextTower)
        if self.encoder.padding is not None:  # SigLIP is read at its last position.
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device, dtype=torch.long)
        return super()._pool(hidden, attention_mask, batch)
