"""The commands and their options: a dataclass is a command, its docstring the help of it."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import typer

from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.ollama import DEFAULT_NUM_CTX


# As in `prompt_tuning`, whose import would load torch for every `--help`.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_ARTIFACTS = Path("llm_catalyst_artifacts")
KINDS = "auto, ollama:MODEL, openai:MODEL, transformers:MODEL, mutation, replay:FILE"
SECTIONS_HELP = (
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

    sections: str = option("", f"{SECTIONS_HELP} Default: as tune was last told.")


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


def sections_of(listed: str) -> tuple[str, ...]:
    """The sections in a text with commas between."""
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    check_sections(names)
    return names
