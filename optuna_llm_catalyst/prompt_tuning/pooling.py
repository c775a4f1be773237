"""Hidden states to features, as the folder of a sentence encoder says.

sentence-transformers lists the modules of an encoder in ``modules.json``: the transformer, a
pooling, and perhaps a dense layer or a normalisation. Reading them takes a few lines, importing
that package takes seconds. A module that is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
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


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the hidden states (N, T, d) where the mask (N, T) is one, in float32."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)  # (N, d)


def _mean_sqrt_len(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1).sqrt()  # (N, d)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    # The first token weighs one, the second two, and so on.
    weights = (mask.float().cumsum(1) * mask).unsqueeze(-1)
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)  # (N, d)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.float().masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)  # (N, d)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.int().argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.shape[1] - 1 - mask.int().flip(1).argmax(1))


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), positions].float()  # (N, d)


#: By the names of sentence-transformers, in the order in which it concatenates them.
_POOLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": mean_pool,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
#: The modes in older files: a flag for each.
_FLAGS = {
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
        unknown = sorted(set(self.modes) - set(_POOLS))
        if unknown or not self.modes:
            raise ValueError(
                f"The pooling {', '.join(unknown) or '()'} is not known: use {', '.join(_POOLS)}."
            )
        self.layers.eval().requires_grad_(False)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pools hidden states (N, T, d) where the mask (N, T) is one: (N, d'), in float32."""
        pooled = torch.cat([_POOLS[mode](hidden, mask) for mode in self.modes], dim=-1)
        features: Tensor = self.layers(pooled)
        return features


class Normalize(nn.Module):
    """Vectors to unit length."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)


@dataclass(frozen=True)
class _Module:
    type: str
    path: str = ""

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


@dataclass(frozen=True)
class _NormConfig:
    dimension: int


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a sentence encoder is: old ones keep it in ``0_Transformer``."""
    modules = _modules(folder)
    return _inside(folder, modules[0].path) if modules else folder


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a folder.

    A folder without ``modules.json`` is pooled as sentence-transformers does it: by the last
    token if it holds a causal language model, else by the mean.

    Raises:
        ValueError: If a module is not known here, or its files cannot be read.
    """
    modules = _modules(folder)
    if not modules:
        return Pooling(("lasttoken",) if _is_causal(folder) else ("mean",))
    if [module.kind for module in modules[:2]] != ["Transformer", "Pooling"]:
        names = ", ".join(module.type for module in modules)
        raise ValueError(
            f"modules.json lists {names}: it must begin with a Transformer and a Pooling."
        )
    modes = _modes(_config(_inside(folder, modules[1].path)))
    layers = [_layer(module, _inside(folder, module.path)) for module in modules[2:]]
    while layers and isinstance(layers[-1], Normalize):
        layers.pop()
    return Pooling(modes, nn.Sequential(*layers))


def _modules(folder: Path) -> list[_Module]:
    path = folder / "modules.json"
    return decode(list[_Module], _json(path), at="modules") if path.exists() else []


def _inside(folder: Path, path: str) -> Path:
    """A module's folder. The path comes from a file that somebody else wrote."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"modules.json names the folder {path!r}, which is outside the model.")
    return folder / path


def _is_causal(folder: Path) -> bool:
    config = _config(folder)
    first = str((config.get("architectures") or [""])[0])
    return first.endswith("ForCausalLM") and config.get("is_causal", True) is not False


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    if "pooling_mode" in config:
        given = decode(str | list[str], config["pooling_mode"], at="pooling_mode")  # type: ignore[arg-type]
        return (given,) if isinstance(given, str) else tuple(given)
    chosen = (mode for mode, flag in _FLAGS.items() if config.get(f"pooling_mode_{flag}", False))
    return tuple(chosen) or ("mean",)


def _layer(module: _Module, folder: Path) -> nn.Module:
    config = _config(folder)
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ValueError(f"its {module.kind} works on {config[name]}, not on pooled vectors.")
    if module.kind == "Normalize":
        return Normalize()
    if module.kind == "Dropout":
        return nn.Identity()  # It drops nothing outside training.
    if module.kind == "Dense":
        return _dense(decode(_DenseConfig, config), _weights(folder))
    if module.kind == "LayerNorm":
        norm = nn.LayerNorm(decode(_NormConfig, config).dimension)
        return _filled(norm, _weights(folder), "norm.")
    raise ValueError(f"modules.json lists {module.type}, which cannot be run here.")


def _dense(config: _DenseConfig, weights: dict[str, Tensor]) -> nn.Module:
    if config.use_residual:
        raise ValueError("its Dense module has `use_residual`, which cannot be run here.")
    name = config.activation_function
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ValueError(f"its Dense module has the activation {name}, which is none of torch's.")
    linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
    return nn.Sequential(_filled(linear, weights, "linear."), activation())


def _filled(layer: nn.Module, weights: dict[str, Tensor], prefix: str) -> nn.Module:
    own = {name.removeprefix(prefix): value for name, value in weights.items()}
    try:
        layer.load_state_dict(own)
    except RuntimeError as error:  # It takes many lines to say so.
        shapes = ", ".join(f"{name} of {tuple(value.shape)}" for name, value in own.items())
        raise ValueError(f"its {layer} does not match its weights, {shapes}") from error
    return layer.float()


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    found: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return decode(dict[str, Any], _json(path), at=path.name) if path.exists() else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON: {error}") from error
