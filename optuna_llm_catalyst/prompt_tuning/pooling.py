"""Hidden states to features, by the ``modules.json`` of a sentence encoder's folder.

sentence-transformers could read it, too, but takes seconds to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import T


#: The modes by their names in sentence-transformers, in the order in which it concatenates
#: them, each with its flag in older files.
_MODES = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """Hidden states and a mask to one vector a sequence.

    The vectors are compared by their direction: a normalisation at the very end of a folder's
    modules changes nothing and is left out.

    Attributes:
        modes: ``cls``, ``max``, ``mean``, ``mean_sqrt_len_tokens``, ``weightedmean`` or
            ``lasttoken``; the vectors of several are concatenated.
        layers: What follows, in order.
    """

    modes: tuple[str, ...] = ("mean",)
    layers: nn.Sequential = field(default_factory=nn.Sequential)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.modes) - set(_MODES))
        if unknown or not self.modes:
            raise ValueError(
                f"The pooling {', '.join(unknown) or '()'} is not known: use {', '.join(_MODES)}."
            )
        self.layers.eval().requires_grad_(False)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pools hidden states (N, T, d), padded on the right: (N, d'), in float32."""
        hidden = hidden.float()
        pooled = torch.cat([_pool(mode, hidden, mask) for mode in self.modes], dim=-1)
        features: Tensor = self.layers(pooled)
        return features


def _pool(mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if mode == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
    weights = mask.float().unsqueeze(-1)  # (N, T, 1)
    if mode == "weightedmean":  # The first token weighs one, the second two, and so on.
        weights = weights.cumsum(1) * weights
    total = weights.sum(1).clamp(min=1)
    if mode == "mean_sqrt_len_tokens":
        total = total.sqrt()
    return (hidden * weights).sum(1) / total  # (N, d)


class Normalize(nn.Module):
    """Vectors to unit length."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)


@dataclass(frozen=True)
class _Module:
    type: str
    path: str = ""

    def __post_init__(self) -> None:
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ValueError(f"its path is {self.path!r}, which is outside the model")

    @property
    def kind(self) -> str:
        """The name of the class; its place in the package differs between versions."""
        package, _, name = self.type.rpartition(".")
        return name if package.split(".")[0] == "sentence_transformers" else self.type


@dataclass(frozen=True)
class _DenseConfig:
    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a sentence encoder is: old ones keep it in ``0_Transformer``."""
    modules = _read(folder / "modules.json", list[_Module])
    return folder / modules[0].path if modules else folder


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a folder; a ValueError says which module or file cannot be read.

    A folder without ``modules.json`` is pooled as sentence-transformers does it: by the last
    token if it holds a causal language model, else by the mean.
    """
    modules = _read(folder / "modules.json", list[_Module])
    if not modules:
        config = _read(folder / "config.json", dict[str, Any])
        first = str((config.get("architectures") or [""])[0])
        is_causal = first.endswith("ForCausalLM") and config.get("is_causal", True) is not False
        return Pooling(("lasttoken",) if is_causal else ("mean",))
    if [module.kind for module in modules[:2]] != ["Transformer", "Pooling"]:
        names = ", ".join(module.type for module in modules)
        raise ValueError(
            f"modules.json lists {names}: it must begin with a Transformer and a Pooling."
        )
    layers = [_layer(module, folder / module.path) for module in modules[2:]]
    while layers and isinstance(layers[-1], Normalize):
        layers.pop()
    config = _read(folder / modules[1].path / "config.json", dict[str, Any])
    return Pooling(_modes(config), nn.Sequential(*layers))


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    if "pooling_mode" in config:
        given = decode(str | list[str], config["pooling_mode"], at="pooling_mode")  # type: ignore[arg-type]
        return (given,) if isinstance(given, str) else tuple(given)
    chosen = (mode for mode, flag in _MODES.items() if config.get(f"pooling_mode_{flag}"))
    return tuple(chosen) or ("mean",)


def _layer(module: _Module, folder: Path) -> nn.Module:
    config = _read(folder / "config.json", dict[str, Any])
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ValueError(f"its {module.kind} works on {config[name]}, not on pooled vectors.")
    if module.kind == "Normalize":
        return Normalize()
    if module.kind == "Dropout":
        return nn.Identity()  # It drops nothing outside training.
    if module.kind == "Dense":
        return _dense(decode(_DenseConfig, config), folder)
    if module.kind == "LayerNorm":
        width = decode(int, config.get("dimension"), at="dimension")
        return _filled(nn.LayerNorm(width), folder, "norm.")
    raise ValueError(f"modules.json lists {module.type}, which cannot be run here.")


def _dense(config: _DenseConfig, folder: Path) -> nn.Module:
    if config.use_residual:
        raise ValueError("its Dense module has `use_residual`, which cannot be run here.")
    name = config.activation_function
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ValueError(f"its Dense module has the activation {name}, which is none of torch's.")
    linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
    return nn.Sequential(_filled(linear, folder, "linear."), activation())


def _filled(layer: nn.Module, folder: Path, prefix: str) -> nn.Module:
    """A layer with its weights from a folder, in float32."""
    from safetensors.torch import load_file

    if (folder / "model.safetensors").exists():
        weights = load_file(folder / "model.safetensors")
    else:
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    own = {name.removeprefix(prefix): value for name, value in weights.items()}
    try:
        layer.load_state_dict(own)
    except RuntimeError as error:  # Torch's own message is many lines long.
        shapes = ", ".join(f"{name} of {tuple(value.shape)}" for name, value in own.items())
        raise ValueError(f"its {layer} does not match its weights, {shapes}") from error
    return layer.float()


def _read(path: Path, kind: type[T]) -> T:
    """A JSON file; empty if it is not there."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON: {error}") from error
    return decode(kind, value, at=path.stem)
