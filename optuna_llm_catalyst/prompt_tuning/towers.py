"""CLIP and SigLIP taken apart: a text tower that takes soft prompts, and an image tower."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.pooling import Pooling


#: The models that are read, by what their config calls them.
MODEL_TYPES = ("clip", "siglip")
#: What of an image processor's settings changes the pixels.
_SEEN = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


class TextTower(nn.Module):
    """A text tower that takes embeddings in place of token ids, which transformers' own does not.

    CLIP's is causal, so it does not see the padding behind its tokens. SigLIP's looks both ways
    and was trained on texts that are padded to its last position, where it is read: it is given
    this padding whatever comes, and no mask hides it.

    Args:
        tower: The text tower of a CLIPModel or a SiglipModel.
        padding: The token id that fills SigLIP's positions; None for CLIP.
    """

    def __init__(self, tower: Any, padding: int | None) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config
        self.padding = padding

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.tower.embeddings.token_embedding
        return embeddings

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **rest: Any
    ) -> Any:
        """The tower's output, with ``last_hidden_state`` of shape ``(N, T, d)``.

        Args:
            input_ids: Token ids, ``(N, T)``.
            inputs_embeds: Their embeddings in place of them, ``(N, T, d)``.
            rest: What else a tokenizer says of the tokens. It is not read, see above.
        """
        from transformers.modeling_outputs import BaseModelOutput

        if inputs_embeds is None:
            assert input_ids is not None
            return self.tower(input_ids=self._filled(input_ids))
        if self.padding is not None:
            n_missing = self._n_missing(inputs_embeds)
            ids = torch.full((len(inputs_embeds), n_missing), self.padding)
            filling = self.get_input_embeddings()(ids.to(inputs_embeds.device))
            inputs_embeds = torch.cat([inputs_embeds, filling], dim=1)
        hidden = self.tower.embeddings(inputs_embeds=inputs_embeds)
        mask = _causal_mask(hidden) if self.padding is None else None
        hidden = self.tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.tower.final_layer_norm(hidden))

    def _filled(self, ids: Tensor) -> Tensor:
        if self.padding is None:
            return ids
        return F.pad(ids, (0, self._n_missing(ids)), value=self.padding)

    def _n_missing(self, tokens: Tensor) -> int:
        return max(0, int(self.config.max_position_embeddings) - tokens.shape[1])


@dataclass(frozen=True, eq=False)
class ImageTower:
    """What turns images into features.

    Attributes:
        model: The whole model.
        processor: Its image processor.
    """

    model: Any
    processor: Any

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def pixels(self) -> dict[str, Any]:
        """The settings that tell what the model sees of an image."""
        settings = self.processor.to_dict()
        return {name: settings.get(name) for name in _SEEN}

    @torch.no_grad()
    def __call__(self, images: Iterable[Any]) -> Tensor:
        """Features (n, d) of RGB images in float32, in one pass.

        The images are taken one by one: photographs are far larger than what is read of them.
        """
        weights = next(self.model.parameters())
        read = [self.processor(images=image, return_tensors="pt") for image in images]
        pixels = torch.cat([inputs["pixel_values"] for inputs in read])  # (n, 3, h, w)
        found = self.model.get_image_features(pixels.to(weights.device, weights.dtype))
        features: Tensor = getattr(found, "pooler_output", found)
        return features.float()


def take_apart(
    model: Any, tokenizer: Any, processor: Any
) -> tuple[TextTower, Pooling, ImageTower]:
    """The text tower of a CLIPModel or a SiglipModel, what pools it, and the image tower.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        processor: Its image processor.

    Raises:
        ValueError: If it is another model.
    """
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        raise ValueError(not_two_towers(kind))
    is_clip = kind == "clip"
    text_tower = TextTower(model.text_model, None if is_clip else tokenizer.pad_token_id or 0)
    # Pooling is in float32, whatever the model is in. CLIP's last token is [EOS].
    projection = deepcopy(model.text_projection if is_clip else model.text_model.head).float()
    pooling = Pooling(("lasttoken",), nn.Sequential(projection))
    return text_tower, pooling, ImageTower(model, processor)


def not_two_towers(kind: str) -> str:
    """What to say of a model that is neither CLIP nor SigLIP."""
    return f"it is a {kind} model: images are read by CLIP and SigLIP models."


def _causal_mask(hidden: Tensor) -> Tensor:
    """What is added to the attention of hidden states (N, T, d): (1, 1, T, T)."""
    length, lowest = hidden.shape[1], torch.finfo(hidden.dtype).min
    return hidden.new_full((length, length), lowest).triu(1)[None, None]
