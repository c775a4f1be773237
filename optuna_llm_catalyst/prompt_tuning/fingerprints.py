"""What tells models apart: their settings, and samples and sums of their weights."""

from __future__ import annotations

from collections.abc import Iterable
import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn
from torch import Tensor


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


def fingerprint_of(parts: Iterable[Any], modules: Iterable[nn.Module]) -> str:
    """16 hex digits over what JSON can write and the weights of modules: the same anywhere.

    Weights of a pooler are left out.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_written(part))
    for module in modules:
        for name, weights in sorted(module.state_dict().items()):
            if not name.startswith("pooler"):
                digest.update(_written([name, list(weights.shape)]))
                digest.update(_sample(weights))
    return digest.hexdigest()[:16]


def lasting(config: Any) -> Any:
    """A config without incidental entries. Those that are off may come from a newer version."""
    if not isinstance(config, dict):
        return config
    return {
        str(key): lasting(value)
        for key, value in config.items()
        if key not in _INCIDENTAL and value is not None and value is not False
    }


def _written(part: Any) -> bytes:
    return json.dumps(part, sort_keys=True, default=str).encode()


def _sample(weights: Tensor) -> bytes:
    """A sample of the weights, and a sum over all of them as integers, which is exact anywhere."""
    flat = weights.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLES)].float().cpu().numpy().tobytes()
    every = flat.cpu().contiguous().view(torch.uint8).numpy()
    whole = len(every) // 8 * 8
    total: np.uint64 = every[:whole].view(np.uint64).sum(dtype=np.uint64)
    return some + total.tobytes() + every[whole:].tobytes()
