"""The layers of an encoder: what is added to their inputs in one pass, and how wide these are.

Hooks see one pass of one thread and are removed behind it, whatever happens in it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
import threading
from typing import Any

import torch
from torch import nn
from torch import Tensor


_N_CLIPPINGS = 5
_CLIPPED_AT = 3.0


@torch.no_grad()
def find_layers(encoder: nn.Module, embedded: Tensor) -> tuple[list[nn.Module], int]:
    """The layers, the first first, and their width; none and 0 if they cannot take a prompt.

    Some encoders run one layer many times, or have sequences along another axis.

    Args:
        encoder: An encoder in eval mode.
        embedded: Embeddings of a sequence to try it with, ``(1, T, d)`` for a ``T`` above 1.
    """
    n_layers = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            with watched(list(module)) as seen:
                encoder(inputs_embeds=embedded)
            # Longformer's sequences grow to whole windows.
            shapes = [tuple(states.shape) for states in seen.values()]
            fits = all(len(s) == 3 and s[0] == 1 and s[1] >= embedded.shape[1] for s in shapes)
            widths = {s[-1] for s in shapes}
            if len(module) > 1 and fits and len(widths) == 1 and len(shapes) == len(module):
                return list(module), widths.pop()
    return [], 0


@contextmanager
def added(
    layers: list[nn.Module], changes: Mapping[int, Tensor], *, offset: int
) -> Iterator[None]:
    """Adds to the hidden states of virtual tokens before layers, within a ``with`` block.

    Args:
        layers: The encoder's layers.
        changes: By layer, what is added, of shape ``(N, L, d)`` for ``N`` sequences.
        offset: The first virtual token's position.
    """

    def add(layer: int, hidden: Tensor) -> Tensor:
        change = changes[layer].to(hidden.dtype)
        length = change.shape[1]
        if hidden.ndim != 3 or len(hidden) != len(change):
            raise ValueError(
                f"layer {layer} reads hidden states of shape {tuple(hidden.shape)}, not one row "
                f"for each of {len(change)} sequences: it cannot take a deep prompt."
            )
        before, own, after = hidden.split([offset, length, hidden.shape[1] - offset - length], 1)
        return torch.cat([before, own + change, after], 1)

    with _hooked([(layers[layer], layer) for layer in changes], add):
        yield


@contextmanager
def watched(layers: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Keeps the hidden states before each layer, ``(N, T, d)``, within a ``with`` block."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        seen[layer] = hidden
        return hidden

    with _hooked([(layer, i) for i, layer in enumerate(layers)], keep):
        yield seen


def spread(values: Tensor) -> float:
    """The standard deviation after five times clipping at three of them (BBTv2's code)."""
    values = values.cpu().double().flatten()
    for _ in range(_N_CLIPPINGS):
        mean, deviation = values.mean(), values.std()
        values = values.clamp(mean - _CLIPPED_AT * deviation, mean + _CLIPPED_AT * deviation)
    return values.std().item()


@contextmanager
def _hooked(
    layers: list[tuple[nn.Module, int]], change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Gives the hidden states before layers to a function, and what it returns to the layers."""
    thread = threading.get_ident()

    def hook_of(layer: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            # Another thread may use the encoder at the same time. Where this one removes the hook
            # just then, torch forgets that it takes keywords.
            if threading.get_ident() != thread or kwargs is None:
                return None
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                return None
            if args:
                return (change(layer, hidden), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(layer, hidden)}

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(layer), with_kwargs=True)
        for module, layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
