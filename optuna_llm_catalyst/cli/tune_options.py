"""The options of ``tune``."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import MISSING
from pathlib import Path
from typing import Literal

from optuna_llm_catalyst.cli.options import argument
from optuna_llm_catalyst.cli.options import count
from optuna_llm_catalyst.cli.options import DEFAULT_ARTIFACTS
from optuna_llm_catalyst.cli.options import LLMOptions
from optuna_llm_catalyst.cli.options import ModelOptions
from optuna_llm_catalyst.cli.options import option
from optuna_llm_catalyst.cli.options import rate
from optuna_llm_catalyst.cli.options import SECTIONS_HELP
from optuna_llm_catalyst.cli.options import StudyOptions
from optuna_llm_catalyst.prompt_space import MAX_VIRTUAL_TOKENS
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.providers.base import DEFAULT_TIMEOUT_S


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
    sections: str = option(",".join(DEFAULT_SECTIONS), SECTIONS_HELP)
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
