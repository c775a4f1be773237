"""The commands and their options: a dataclass is a command, its docstring the help of it."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import MISSING
from pathlib import Path
from typing import Any
from typing import Literal

import typer

from optuna_llm_catalyst.prompt_space import MAX_VIRTUAL_TOKENS
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.base import DEFAULT_TIMEOUT_S
from optuna_llm_catalyst.providers.ollama import DEFAULT_NUM_CTX


# As in `prompt_tuning`, whose import would load torch for every `--help`.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_ARTIFACTS = Path("llm_catalyst_artifacts")
KINDS = "auto, ollama:MODEL, openai:MODEL, transformers:MODEL, mutation, replay:FILE"
_SECTIONS_HELP = (
    f"Sections of the meta-prompt, by name and with commas between, of {', '.join(SECTIONS)}."
)


def option(default: Any, help: str, *flag: str, **limits: Any) -> Any:
    """An option of the field's name; ``limits`` are typer's, as ``min`` and ``max``."""
    return field(default=default, metadata={"typer": typer.Option(*flag, help=help, **limits)})


def count(default: int | None, help: str, *, least: int = 0, most: int = 2**31 - 1) -> Any:
    """An option that is a whole number."""
    return option(default, help, min=least, max=most)


def rate(help: str) -> Any:
    """An option that is a learning rate; larger ones overflow float32."""
    return option(5e-3, help, min=1e-12, max=1e38)


def argument(default: Any, help: str) -> Any:
    """A value without a name."""
    return field(default=default, metadata={"typer": typer.Argument(help=help)})


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How to print."""

    json: bool = option(False, "Print one JSON document, for machines.", "--json")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(OutputOptions):
    """Which study."""

    storage: str = option(
        "sqlite:///catalyst.db",
        "Optuna storage: a database URL, or a path ending in .log (journal).",
    )
    study_name: str = option("prompt-tuning", "Name of the study.")


@dataclass(frozen=True, kw_only=True)
class ShowOptions(StudyOptions):
    """Show the stages of a study, or the story of one."""

    trial: int | None = count(None, "Number of one stage.")


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How to load the frozen model."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, …")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", "--trust-remote-code"
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadingOptions):
    """The frozen model."""

    model: str = option(DEFAULT_MODEL, "Frozen encoder: a folder or a name.")


@dataclass(frozen=True, kw_only=True)
class KnownModelOptions(LoadingOptions):
    """The frozen model of what was tuned."""

    model: str = option(
        "", "Where the frozen model is: a folder or a name. Default: where it was for tune."
    )


@dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """Which LLM, and where."""

    llm: str = option(
        "auto",
        f"Who proposes restarts: {KINDS}. auto: Ollama if it answers, else for demo recorded "
        "replies, else templates and mutation.",
    )
    llm_url: str = option("", "URL of the LLM's server, if not Ollama's usual one.")
    llm_api_key: str = option("", "API key for openai:MODEL. Default: $LLM_CATALYST_API_KEY.")
    num_ctx: int = count(
        DEFAULT_NUM_CTX, "The LLM's context in tokens; keep it for a whole study.", least=2048
    )


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(ModelOptions, LLMOptions, OutputOptions):
    """Check what is installed and reachable, and try the LLM. Exit code 1 if tuning cannot run."""


@dataclass(frozen=True, kw_only=True)
class MetaPromptCommand(StudyOptions):
    """Print what the LLM would be told for the next stage, and how long it is."""

    sections: str = option("", f"{_SECTIONS_HELP} Default: as tune was last told.")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(KnownModelOptions, StudyOptions):
    """Export the classifier, the soft prompt of one stage (--trial), or the LLM's replies."""

    output: Path | None = argument(None, "Folder to write to; made if need be.")
    trial: int | None = count(None, "Number of a stage: export its soft prompt.")
    replies: Path | None = option(
        None, "JSONL file for the LLM's replies, to repeat: tune --llm replay:FILE"
    )
    peft: Path | None = option(
        None, "Folder for the soft prompt as a PEFT adapter; needs --prompt-position front."
    )
    artifacts: Path = option(DEFAULT_ARTIFACTS, "Folder of the trained soft prompts.")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(KnownModelOptions):
    """Classify texts, or images by their paths, with what export wrote. Prints a JSON row each."""

    folder: Path = argument(MISSING, "Folder that export wrote.")
    text: list[str] = option((), "A text, or the path of an image; may be given several times.")
    input: Path | None = option(
        None,
        'File of texts: .csv, .tsv, or else a row of JSON a line, such as {"text": "…"} or "…". '
        "Default: such rows from stdin. A row's id is kept.",
    )
    text_column: str = option("text", "Where a row has its text.")
    text_pair_column: str = option("text_pair", "Where a row has its second text, if it has one.")
    proba: bool = option(False, "Print the probabilities of all labels.", "--proba")
    batch_size: int = count(256, "Texts that are read and classified at once.", least=1)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(LLMOptions, ModelOptions, StudyOptions):
    """Tune a prompt: run stages, each restarted where the LLM proposes. Resumes a study."""

    data: str = argument(
        MISSING,
        "File of labelled texts (CSV, TSV, JSONL, Parquet), or a folder with files train, "
        "validation and test, or with images as in train/LABEL/1.png; hf:NAME for a data set of "
        "the Hugging Face hub, also hf:NAME:CONFIG and hf:NAME@REVISION; demo for the "
        "customer-support messages of the package.",
    )
    text: str = option("", "Column of the texts. Default: text, or one that is called like that.")
    text_pair: str = option("", "Column of second texts, for tasks on pairs.")
    label: str = option("", "Column of the labels. Default: label, or one that is called so.")
    model_type: (
        Literal["dual-encoder", "sequence-classifier", "masked-lm", "causal-lm", "clip"] | None
    ) = option(
        None,
        "How the model classifies: by the label nearest to a text, by a linear head, by the word "
        "that fills a blank, by the words that go on behind a text, or by the label nearest to an "
        "image. Default: as the model's config.json says; dual-encoder for sentence encoders.",
    )
    prompt_position: Literal["behind_cls", "front"] | None = option(
        None,
        "Where a sequence-classifier's prompt stands: behind [CLS] (the default), or in front of "
        "all, for export --peft.",
    )
    template: str = option(
        "",
        "What a language model reads. Default: {text} It was {mask}. for a masked-lm, {text} It "
        "was for a causal-lm. Also: {text_pair}.",
    )
    verbalizer: list[str] = option(
        (),
        "LABEL=WORD,WORD: words that stand for a label in the blank of a masked-lm, or behind a "
        "causal-lm's text; may be given several times. Default: the label itself.",
    )
    num_virtual_tokens: int = count(
        8, "Length of the prompt in tokens.", least=1, most=MAX_VIRTUAL_TOKENS
    )
    stages: int = count(10, "Stages to run now, on top of finished ones.")
    stages_at_once: int = count(
        1,
        "Stages that are trained in one expanded batch; less time, more memory. They are "
        "proposed before any of them has an outcome.",
        least=1,
    )
    timeout: float | None = option(None, "Seconds after which no new stage starts.", min=0)
    metric: Literal["loss", "accuracy", "macro-f1"] = option(
        "loss", "What is optimised, on the validation examples."
    )
    stage: Literal["gradient", "contrastive", "bbt", "bbtv2", "gdfo", "zo"] = option(
        "gradient",
        "How a stage trains: by gradients, of the cross entropy or of a contrastive loss; without "
        "any by CMA-ES, on the prompt at the input (bbt), on one at every layer (bbtv2), or led "
        "by a student (gdfo); by gradients estimated from queries (zo).",
    )
    prompt_kind: Literal["soft", "deep", "lowrank"] | None = option(
        None,
        "A prompt at the input (soft), at every layer (deep), or at the input and other for each "
        "text (lowrank). Default: soft; deep for bbtv2.",
    )
    rank: int | None = count(
        None, "Rank of what makes a lowrank prompt other for each text. Default: 4.", least=1
    )
    steps: int = count(60, "Optimiser steps of a gradient stage.")
    queries: int = count(400, "Queries of a stage without gradients.")
    population_size: int = count(20, "Prompts of bbt that are tried at once.", least=4)
    intrinsic_dim: int = count(500, "Numbers that bbt searches for each layer.", least=2)
    alpha: float = option(
        1.0, "How far bbt looks at first, in spreads of the embeddings.", min=1e-12, max=1e38
    )
    gd_weight: float = option(0.5, "Weight of gdfo's student; 0: bbt.", min=0, max=1)
    lr: float | None = option(
        None,
        "Learning rate of the prompt. Default: 5e-3; 5 for zo.",
        min=1e-12,
        max=1e38,
    )
    schedule: Literal["constant", "cosine"] = option(
        "constant", "How the learning rate changes within a stage."
    )
    eval_every: int | None = count(
        None, "Between two evaluations. Default: 10 steps, or 100 queries.", least=1
    )
    patience: int | None = count(
        None, "Evaluations in a row without a better one that end a stage.", least=1
    )
    search: list[str] = option(
        (),
        "What the study chooses for each stage, with commas between: lr (from a fifth to five "
        "times its value), schedule; for bbt alpha (likewise), intrinsic_dim; for gdfo also "
        "gd_weight.",
    )
    pruner: Literal["none", "median", "hyperband"] = option(
        "none",
        "Ends stages that fall behind after a third of their steps; never one that trains a text "
        "prompt.",
    )
    text_prompts: int | None = count(
        None,
        "Prompts before the texts that the study keeps. Default: 1 where the model takes any and "
        "stages have gradients.",
    )
    later_texts: Literal["plain", "turns", "prompted"] = option(
        "plain",
        "What later stages read: plain texts, ones under kept text prompts, or both in turns.",
    )
    text_steps: int | None = count(None, "Steps of a stage with a text prompt. Default: --steps.")
    text_lr: float = rate("Learning rate of a text prompt.")
    refine_steps: int = count(
        0,
        "Steps at most of one last, long stage that continues the best; 0: none. It ends after "
        "--patience evaluations, by default 3.",
    )
    shots: int = count(0, "Train and validate on so many examples a label; 0: on all.")
    seed: int = count(0, "Seed of everything random, the draw of splits included.")
    llm_timeout: float = option(
        DEFAULT_TIMEOUT_S,
        "Seconds for one proposal, loading and retries included.",
        min=1,
        max=86_400,
    )
    sections: str = option(",".join(DEFAULT_SECTIONS), _SECTIONS_HELP)
    share_examples: bool = option(
        False,
        "Show texts of the task to the LLM and keep them in the study. Off by default: they "
        "leave the training process.",
        "--share-examples",
    )
    prefetch: bool = option(
        False, "Propose the next restart while a stage trains; saves time.", "--prefetch"
    )
    task_description: str = option("", "What the LLM is told of the task. Default: card.json's.")
    startup_prompt: list[str] = option((), "Text of a first stage; may be given several times.")
    startup: Literal["task", "random"] = option(
        "task",
        "What stages start from where there is no proposal: templates filled with the task's "
        "description and labels, or random words.",
    )
    n_startup_trials: int | None = count(
        None, "Stages before the first proposal or mutation. Default: 0 with an LLM, else 8."
    )
    n_candidates: int = count(4, "Candidates a proposal.", least=1, most=1000)
    top_k: int = count(10, "Prompts of the history that a proposal sees.", least=1)
    screen: Literal["own", "ensemble", "none"] = option(
        "own",
        "How the best candidate is chosen: by its own loss before training, by the loss of the "
        "study's ensemble with it, or not at all: the first is taken.",
    )
    artifacts: Path = option(DEFAULT_ARTIFACTS, "Folder of the trained soft prompts.")


def sections_of(listed: str) -> tuple[str, ...]:
    """The sections in a text with commas between."""
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    check_sections(names)
    return names
