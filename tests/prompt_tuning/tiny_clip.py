"""Tiny random CLIP and SigLIP models with what belongs to them, and coloured squares."""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import Tokenizer
import torch
from torch import nn
from transformers import CLIPConfig
from transformers import CLIPImageProcessorPil
from transformers import CLIPModel
from transformers import CLIPTokenizer
from transformers import PreTrainedTokenizerFast
from transformers import SiglipConfig
from transformers import SiglipImageProcessorPil
from transformers import SiglipModel

from optuna_llm_catalyst.prompt_tuning import CLIPClassifier
from optuna_llm_catalyst.prompt_tuning import Pretrained


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "deep_blue": (20, 40, 210)}
COLOUR_NAMES = tuple(sorted(COLOURS))
WORDS = (
    *"a an the this that of photo picture image good close up colour square wolf bread".split(),
    *"red green deep blue light dark paint thing shape show what is in it".split(),
)
N_POSITIONS = 16
_SIDE = 16
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": N_POSITIONS,
}
_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": _SIDE,
    "patch_size": 8,
}
FAMILIES = ("clip", "siglip")


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own class, with a byte-pair encoding that knows the words."""
    tokens = {c: None for word in WORDS for c in word} | {f"{w[-1]}</w>": None for w in WORDS}
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        start, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for part in rest:
            merges[start, part] = None
            start += part
            tokens[start] = None
    specials = ("<|startoftext|>", "<|endoftext|>")
    vocab = {token: i for i, token in enumerate((*tokens, *specials))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=N_POSITIONS)


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """As SigLIP's: no token stands in front, and ``</s>`` ends a text and pads it."""
    vocab = {token: i for i, token in enumerate(("<unk>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=N_POSITIONS,
        model_input_names=["input_ids"],
    )


def _clip(tokenizer: Any) -> nn.Module:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer)}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=20))


def _siglip(tokenizer: Any) -> nn.Module:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**_TEXT, **ids, "vocab_size": len(tokenizer), "projection_size": 24}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))


def make_towers(family: str = "clip") -> tuple[Any, Any, Any]:
    """A random model, always the same one, its tokenizer and its image processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "clip":
            tokenizer = clip_tokenizer()
            size = {
                "size": {"shortest_edge": _SIDE},
                "crop_size": {"height": _SIDE, "width": _SIDE},
            }
            model, processor = _clip(tokenizer), CLIPImageProcessorPil(**size)
        else:
            tokenizer = siglip_tokenizer()
            model = _siglip(tokenizer)
            processor = SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
        for name, weights in model.named_parameters():
            # Far larger than at the start of a training: a wrong position or mask must show.
            if name.endswith(("weight", "bias")) and "norm" not in name:
                nn.init.normal_(weights, std=0.2)
        nn.init.constant_(model.logit_scale, 3.0)
    return model.eval(), tokenizer, processor


def make_pretrained(family: str = "clip") -> Pretrained:
    model, tokenizer, processor = make_towers(family)
    return Pretrained.of(model, tokenizer, name=family, image_processor=processor)


def make_clip(family: str = "clip", labels: Sequence[str] = COLOUR_NAMES) -> CLIPClassifier:
    return CLIPClassifier(make_pretrained(family), labels)


def save_towers(folder: Path, family: str = "clip") -> Path:
    """A folder as the hub has them: the processor is written down without its backend."""
    model, tokenizer, processor = make_towers(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[family]
    seen = {"image_processor_type": kind, "size": dict(processor.size)}
    if family == "clip":
        seen["crop_size"] = dict(processor.crop_size)
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder


def square(colour: str, seed: int) -> Image.Image:
    """A square of about a colour, no two the same, with some noise."""
    rng = np.random.default_rng((seed, *colour.encode()))
    height, width = rng.integers(18, 30, size=2)
    pixels = np.array(COLOURS[colour]) + rng.integers(-30, 30, size=(height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_squares(folder: Path, **splits: int) -> Path:
    """Folders of so many squares of each colour: ``train/red/0.png``."""
    for i, (split, n) in enumerate(splits.items()):
        for colour in COLOURS:
            place = folder / split / colour
            place.mkdir(parents=True)
            for j in range(n):
                square(colour, seed=100 * i + j).save(place / f"{j}.png")
    return folder
