"""A short digest of a model: a study records it and so notices another model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.pooling import Pooling


#: Entries of a config that do not change the hidden states.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SAMPLES = 64


def fingerprint(encoder: nn.Module, tokenizer: Any, pooling: Pooling) -> str:
    """16 hex digits over a config, a vocabulary and weights: the same in every process.

    Args:
        encoder: The encoder. Its pooler is left out: nothing here uses it, and where a folder
            has no weights for it, it is random.
        tokenizer: Its tokenizer.
        pooling: Its pooling.
    """
    digest = hashlib.sha256()
    config = getattr(encoder, "config", None)
    _add(digest, type(encoder).__name__, _lasting(config.to_dict()) if config is not None else {})
    _add(digest, sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids)
    _add(digest, pooling.modes, str(pooling.layers))
    for module in (encoder, pooling.layers):
        for name, weights in sorted(module.state_dict().items()):
            if not name.startswith("pooler"):
                _add(digest, name, list(weights.shape))
                digest.update(_weights(weights))
    return digest.hexdigest()[:16]


def _add(digest: Any, *values: Any) -> None:
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())


def _lasting(config: Any) -> Any:
    """A config without incidental entries. Those that are off may come from a newer version."""
    if not isinstance(config, dict):
        return config
    return {
        str(key): _lasting(value)
        for key, value in config.items()
        if key not in _INCIDENTAL and value is not None and value is not False
    }


def _weights(weights: Tensor) -> bytes:
    """A sample of the weights, and a sum over all of them as integers, which is exact anywhere."""
    flat = weights.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLES)].float().cpu().numpy().tobytes()
    every = flat.cpu().contiguous().view(torch.uint8).numpy()
    whole = len(every) // 8 * 8
    total: np.uint64 = every[:whole].view(np.uint64).sum(dtype=np.uint64)
    return some + total.tobytes() + every[whole:].tobytes()
