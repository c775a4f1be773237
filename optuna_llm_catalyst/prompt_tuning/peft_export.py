"""A trained prompt and its head as a folder that PEFT loads.

PEFT puts virtual tokens in front of the whole sequence, and keeps what a sequence classifier
trains besides (``modules_to_save``) in the adapter's own file. None of transformers' sequence
classifiers pools and scales as :class:`SequenceClassifier` does, so the folder's ``README.md``
holds one that does, in plain torch.

The files are written without PEFT: they are JSON and safetensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
import tempfile
from typing import Any

from safetensors.torch import save

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.models import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel


_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"

#: The pooling modes over ``hidden`` (N, T, d) and ``mask`` (N, T, 1), as the card writes them.
_POOLED = {
    "cls": "hidden[:, 0]",
    "max": "hidden.masked_fill(mask == 0, -torch.inf).amax(1)",
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "mean_sqrt_len_tokens": "(hidden * mask).sum(1) / mask.sum(1).sqrt()",
    "weightedmean": "(hidden * mask * mask.cumsum(1)).sum(1) / (mask * mask.cumsum(1)).sum(1)",
    "lasttoken": "hidden[torch.arange(len(hidden)), mask.sum((1, 2)).long() - 1]",
}

_TEMPLATE = '''\
---
library_name: peft
base_model: {base_model}
---

# Soft prompt with a linear head

Trained with optuna-llm-catalyst. PEFT puts the {length} virtual tokens in front of each text; the
head that was trained with them is in the same file. In this folder, with torch, transformers and
peft alone:

```python
import peft
import torch
from torch import nn
import transformers

BASE = {base!r}
LABELS = {labels!r}
# The prompt was trained from the words {text!r}.


class Classifier(nn.Module):
    """The frozen encoder with a linear head, whose weights come with the prompt."""

    def __init__(self):
        super().__init__()
        self.encoder = transformers.{loader}
        self.config, self.device = self.encoder.config, self.encoder.device
        self.classifier = nn.Linear({width}, len(LABELS))

    # PEFT calls it, with `labels` and other options as well.
    def forward(self, inputs_embeds, attention_mask, labels=None, **rest):
        outputs = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **rest)
        hidden, mask = outputs.last_hidden_state.float(), attention_mask.unsqueeze(-1)
        pooled = {pooled}
        scaled = nn.functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5
        return self.classifier(scaled)


tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
{padding}model = peft.PeftModel.from_pretrained(Classifier(), ".")


@torch.no_grad()
def logits(texts, text_pairs=None):
    inputs = tokenizer(
        texts,
        text_pairs,
        padding=True,
        padding_side="right",
        truncation=True,
        max_length={max_length},
        return_tensors="pt",
    )
    return model(**inputs)
```

`LABELS[logits(["a text"]).argmax()]` is the label of a text.
'''


def write_peft(trained: TrainedPrompt, model: TaskModel, folder: str | Path) -> list[Path]:
    """Writes a trained prompt as a PEFT adapter with a model card, and returns the files.

    ``PeftModel.from_pretrained`` loads the folder; the card holds the few lines around it that
    give the model's own logits.

    Args:
        trained: A soft prompt of a ``SequenceClassifier`` with ``prompt_position="front"``.
        model: That classifier. By its ``name`` the card's lines load the encoder.
        folder: Made if need be; an adapter that is there is replaced.

    Raises:
        CheckpointError: If PEFT cannot give the same logits, the prompt is another model's, or
            the folder cannot be written or holds a ``README.md`` that is no adapter's.
    """
    files, folder = peft_files(trained, model), Path(folder)
    if (folder / _CARD).exists() and not (folder / _CONFIG).exists():
        raise CheckpointError(
            f"{folder} has a {_CARD} of something else (there is no {_CONFIG}): choose another "
            "folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the old files, which stay until the new ones are whole.
        with tempfile.TemporaryDirectory(dir=folder) as new:
            for name, content in files.items():
                Path(new, name).write_bytes(content)
            for name in files:
                os.replace(Path(new, name), folder / name)
    except OSError as error:
        said = error.strerror or first_line(error)
        raise CheckpointError(f"{folder} cannot be written: {said}.") from error
    return [folder / name for name in files]


def peft_files(trained: TrainedPrompt, model: TaskModel) -> dict[str, bytes]:
    """The files of :func:`write_peft` by their names; it raises the same errors."""
    classifier = _checked(trained, model)
    head = {name: tensor[0] for name, tensor in trained.prompt.head.items()}
    if head.keys() != {"weight", "bias"}:
        raise CheckpointError(f"the prompt's head has the parts {sorted(head)}: it is not linear.")
    soft = trained.prompt.words()[0]  # (L, d)
    tensors = {
        "prompt_embeddings": soft,
        "base_model.classifier.weight": head["weight"],  # (C, d')
        "base_model.classifier.bias": head["bias"],  # (C,)
    }
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = json.dumps(_config(classifier, *soft.shape), indent=2, sort_keys=True)
    card = _card(trained, classifier, width=head["weight"].shape[1])
    return {
        _WEIGHTS: save(cpu, metadata={"format": "pt"}),
        _CONFIG: f"{config}\n".encode(),
        _CARD: card.encode(),
    }


def _checked(trained: TrainedPrompt, model: TaskModel) -> SequenceClassifier:
    """The model, if it is the prompt's own and PEFT can give its logits."""
    facts, kind = trained.facts, trained.prompt.kind.name
    if not isinstance(model, SequenceClassifier):
        raise _refusal(f"it puts a prompt before a text, {type(model).__name__} does not")
    if model.prompt_position != "front":
        raise _refusal(
            "it puts a prompt in front of the whole text, this model behind the [CLS]: train with "
            "`prompt_position='front'` (--prompt-position front)"
        )
    if kind != SOFT.name:
        raise _refusal(f"its prompt tuning has soft prompts only, this one is of kind {kind!r}")
    if layers := [type(layer).__name__ for layer in model.pretrained.pooling.layers]:
        raise _refusal(f"the encoder's pooling has layers of its own: {', '.join(layers)}")
    if (facts.fingerprint, facts.labels) != (model.fingerprint, model.labels):
        raise CheckpointError(
            f"the prompt was trained on {facts.model_name!r} (fingerprint {facts.fingerprint}) "
            f"for the labels {', '.join(facts.labels)}; this model is {model.name!r} "
            f"({model.fingerprint}) for {', '.join(model.labels)}: use the prompt's own."
        )
    return model


def _refusal(reason: str) -> CheckpointError:
    return CheckpointError(f"PEFT cannot give the logits of this prompt: {reason}.")


def _config(model: SequenceClassifier, length: int, width: int) -> dict[str, Any]:
    """What PEFT reads of an adapter; it warns of entries that it does not know."""
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "modules_to_save": ["classifier"],
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        # PEFT asks for these two, and uses them for other kinds of prompts only.
        "num_layers": model.placement.n_layers,
        "num_attention_heads": getattr(model.encoder.config, "num_attention_heads", 1),
    }


def _card(trained: TrainedPrompt, model: SequenceClassifier, *, width: int) -> str:
    """The model card; ``width`` is that of the pooled vectors."""
    modes = [_POOLED[mode] for mode in model.pretrained.pooling.modes]
    tokenizer = model.pretrained.tokenizer
    padding = ""
    if tokenizer.pad_token is None:  # Whatever it is, it is masked.
        padding = f"tokenizer.pad_token = {tokenizer.convert_ids_to_tokens(0)!r}\n"
    return _TEMPLATE.format(
        base_model=json.dumps(model.name),
        base=model.name,
        labels=list(model.labels),
        text=trained.facts.text,
        length=trained.prompt.words().shape[1],
        loader=_loader(model),
        width=width,
        pooled=modes[0] if len(modes) == 1 else f"torch.cat([{', '.join(modes)}], dim=-1)",
        padding=padding,
        max_length=model.max_text_tokens,
    )


def _loader(model: SequenceClassifier) -> str:
    """How transformers loads the encoder by the card's ``BASE``."""
    import transformers

    config: Any = model.encoder.config
    name = type(model.encoder).__name__
    if hasattr(transformers, name):
        return f"{name}.from_pretrained(BASE)"
    # A part of a model, or code that comes with the weights.
    part = ".get_encoder()" if config.is_encoder_decoder else ""
    return f"AutoModel.from_pretrained(BASE){part}"
