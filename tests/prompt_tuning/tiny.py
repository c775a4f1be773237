"""Tiny random encoders, tokenizers for them, and a task: what the tests of this folder run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import optuna
from optuna.artifacts._protocol import ArtifactStore
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import Tokenizer
import torch
from torch import nn
from torch import Tensor
from transformers import BertConfig
from transformers import BertModel
from transformers import DistilBertConfig
from transformers import DistilBertModel
from transformers import ElectraConfig
from transformers import ElectraModel
from transformers import MPNetConfig
from transformers import MPNetModel
from transformers import PreTrainedTokenizerFast
from transformers import RobertaConfig
from transformers import RobertaModel

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import Tensors
from optuna_llm_catalyst.prompt_tuning.split import Split


TOPICS = {
    "wild_animal": ("wolf", "bear", "tiger", "eagle", "whale"),
    "food": ("bread", "cheese", "apple", "rice", "soup"),
    "tool": ("hammer", "drill", "wrench", "saw", "pliers"),
}
LABELS = tuple(TOPICS)
FILLERS = tuple(
    "the this that about there people write some other number way could than first been call "
    "who find long down day did get come made may part over new sound take only little work "
    "know place year live back give most very after thing our just name good".split()
)
VOCABULARY = (
    *("a", "wild", "animal", "food", "tool"),
    *(word for words in TOPICS.values() for word in words),
    *FILLERS,
    *("##s", "##ing", "##er"),
)
#: What a text and its prompt can take together, in every tiny encoder.
N_POSITIONS = 40


def bert_tokenizer(*, token_types: bool, leading: str = "[CLS] ") -> PreTrainedTokenizerFast:
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocab = {token: i for i, token in enumerate((*specials, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{leading}$A [SEP]",
        pair=f"{leading}$A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return _hugging_face(tokenizer, specials, token_types=token_types)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    specials = ("<pad>", "<unk>", "<s>", "</s>")
    # The padding token has the id 1, from which RoBERTa's positions count on.
    vocab = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", *VOCABULARY))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")],
    )
    return _hugging_face(tokenizer, specials, token_types=False)


def _hugging_face(
    tokenizer: Tokenizer, specials: tuple[str, ...], *, token_types: bool
) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, unk, cls, sep = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        model_input_names=["input_ids", "attention_mask"] + ["token_type_ids"] * token_types,
    )


#: Weights far larger than at the start of a training, so that a wrong position, mask or token
#: type shows in the features.
_SIZES: dict[str, Any] = {
    "vocab_size": 4 + len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}


def _bert() -> nn.Module:
    return BertModel(BertConfig(**_SIZES, max_position_embeddings=N_POSITIONS))


def _roberta() -> nn.Module:
    config = RobertaConfig(
        **_SIZES, max_position_embeddings=N_POSITIONS + 2, pad_token_id=1, type_vocab_size=1
    )
    return RobertaModel(config)


def _mpnet() -> nn.Module:
    config = MPNetConfig(**_SIZES, max_position_embeddings=N_POSITIONS + 2, pad_token_id=1)
    return MPNetModel(config)


def _distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=_SIZES["vocab_size"],
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        initializer_range=0.3,
        max_position_embeddings=N_POSITIONS,
    )
    return DistilBertModel(config)


def _narrow() -> nn.Module:
    """Its word embeddings are narrower than its features, as ALBERT's and small ELECTRA's."""
    config = ElectraConfig(**_SIZES, embedding_size=16, max_position_embeddings=N_POSITIONS)
    return ElectraModel(config)


ENCODERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], PreTrainedTokenizerFast]]] = {
    "bert": (_bert, lambda: bert_tokenizer(token_types=True)),
    "roberta": (_roberta, roberta_tokenizer),
    "mpnet": (_mpnet, roberta_tokenizer),
    "distilbert": (_distilbert, lambda: bert_tokenizer(token_types=False)),
    "narrow": (_narrow, lambda: bert_tokenizer(token_types=True)),
    # As T5's encoder: no special token stands before the text.
    "headless": (_bert, lambda: bert_tokenizer(token_types=True, leading="")),
}


def make_encoder(name: str = "bert") -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A random encoder, always the same one, and its tokenizer."""
    make, make_tokenizer = ENCODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), make_tokenizer()


def make_pretrained(name: str = "bert") -> Pretrained:
    return Pretrained.of(*make_encoder(name), name=name)


def make_dual(encoder: str = "bert", **options: Any) -> DualEncoderClassifier:
    options = {"max_virtual_tokens": 8} | options
    return DualEncoderClassifier(make_pretrained(encoder), LABELS, **options)


def make_sequence(encoder: str = "bert", **options: Any) -> SequenceClassifier:
    options = {"max_virtual_tokens": 8} | options
    return SequenceClassifier(make_pretrained(encoder), LABELS, **options)


TASK_MODELS: dict[str, Callable[..., TaskModel]] = {"dual": make_dual, "sequence": make_sequence}


def soft(model: TaskModel, embeddings: Tensor, head: Tensors | None = None) -> Prompt:
    """Soft prompts of embeddings (P, L, d), with a head if one is given."""
    prompt = Prompt(SOFT, SOFT.start(embeddings, model.placement))
    return prompt if head is None else prompt.with_head(head)


def hard(model: TaskModel, *texts: str, tokenizer: Any = None) -> Prompt:
    """Soft prompts at the words of texts, which have the same number of tokens; no head."""
    encode = tokenizer or ENCODERS[model.name][1]()
    ids = [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
    return soft(model, model.embed(ids))


def any_head(model: TaskModel, n_prompts: int = 1, seed: int = 0) -> Tensors:
    """Heads that are not the outcome of a fit, which could even differences out."""
    if isinstance(model, DualEncoderClassifier):
        return {}
    width: int = model.encoder.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(n_prompts, len(LABELS), width, generator=generator),
        "bias": torch.randn(n_prompts, len(LABELS), generator=generator),
    }


@torch.no_grad()
def features(model: SequenceClassifier, prompt: Prompt, split: Split) -> Tensor:
    """Unit features of texts under prompts, (P, B, d), read off the log-probabilities."""
    width: int = model.encoder.config.hidden_size
    # The logits are the features themselves, and a zero for reference.
    weight = torch.eye(width + 1, width)[None]
    log_probs = model.log_probs(
        prompt.with_head({"weight": weight, "bias": torch.zeros(1, width + 1)}), split
    )
    return (log_probs[..., :-1] - log_probs[..., -1:]) / width**0.5


def make_examples(n: int, seed: int, *, pairs: bool = False) -> tuple[Example, ...]:
    """Examples of many lengths, each with a word of its label's topic."""
    rng = np.random.default_rng(seed)

    def text(topic: str) -> str:
        words = [str(word) for word in rng.choice(FILLERS, size=rng.integers(1, 10))]
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(TOPICS[topic])))
        return " ".join(words)

    labels = [i % len(LABELS) for i in range(n)]
    return tuple(
        Example(text(LABELS[label]), label, text(LABELS[label]) if pairs else None)
        for label in labels
    )


def make_task(**splits: tuple[Example, ...]) -> Task:
    # Random weights generalise to nothing: what trains on the one must help on the other.
    train = make_examples(24, seed=1)
    defaults = {
        "train": train,
        "validation": train[:18],
        "test": make_examples(18, seed=3),
    }
    return Task(name="topics", labels=LABELS, **(defaults | splits))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return bert_tokenizer(token_types=True)


def make_space(length: int = 3) -> PromptSpace:
    return PromptSpace(tiny_tokenizer(), length)


def tiny_stage(**options: Any) -> GradientStage:
    """A stage that is evaluated at the steps 0, 2, 4 and 5."""
    defaults = {"n_steps": 5, "lr": 0.03, "head_lr": 0.01, "eval_every": 2}
    return GradientStage(**(defaults | options))


def make_objective(
    model_name: str = "dual", *, store: ArtifactStore, length: int = 3, **options: Any
) -> PromptTuningObjective:
    """An objective on which a stage takes milliseconds and lowers the loss."""
    options = {
        "task": make_task(),
        "space": make_space(length),
        "stage": None if "make_stage" in options else tiny_stage(),
        "n_checked_swaps": 2,
        "n_text_prompts": 0,
    } | options
    model: TaskModel = options.pop("model", None) or TASK_MODELS[model_name]()
    task, space = options.pop("task"), options.pop("space")
    return PromptTuningObjective(model, task, space, artifact_store=store, **options)


class AlwaysPruner(BasePruner):
    """Prunes from a given step on, and keeps at which steps it was asked."""

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self.asked: list[int | None] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.asked.append(trial.last_step)
        return trial.last_step is not None and trial.last_step >= self._first
