"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
import sys
from typing import Annotated
from typing import Optional

import optuna
import typer

from optuna_llm_catalyst.cli import doctor as doctor_command
from optuna_llm_catalyst.cli import export as export_command
from optuna_llm_catalyst.cli import meta_prompt as meta_prompt_command
from optuna_llm_catalyst.cli import show as show_command
from optuna_llm_catalyst.cli import tune as tune_command
from optuna_llm_catalyst.cli.llms import KINDS
from optuna_llm_catalyst.cli.llms import LLMOptions
from optuna_llm_catalyst.cli.report import printable
from optuna_llm_catalyst.cli.tune import ModelType
from optuna_llm_catalyst.cli.tune import TuneOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.base import DEFAULT_TIMEOUT_S
from optuna_llm_catalyst.providers.ollama import DEFAULT_NUM_CTX


# As in `prompt_tuning`, whose import would load torch for every `--help`.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_ARTIFACTS = Path("llm_catalyst_artifacts")
_SECTIONS_HELP = (
    f"Sections of the meta-prompt, by name and with commas between, of {', '.join(SECTIONS)}."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prompt tuning on a frozen model, restarted by an LLM, inside Optuna.",
)

Storage = Annotated[
    str, typer.Option(help="Optuna storage: a database URL, or a path ending in .log (journal).")
]
StudyName = Annotated[str, typer.Option(help="Name of the study.")]
Artifacts = Annotated[Path, typer.Option(help="Folder of the trained soft prompts.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]
# typer reads annotations at run time, where Python 3.10 needs Optional for its own classes.
Trial = Annotated[Optional[int], typer.Option(help="Number of one stage.")]  # noqa: UP045
LLM = Annotated[
    str,
    typer.Option(
        help=f"Who proposes restarts: {KINDS}. auto: Ollama if it answers, else mutation."
    ),
]
LLMUrl = Annotated[str, typer.Option(help="URL of the LLM's server, if not Ollama's usual one.")]
LLMKey = Annotated[
    str,
    typer.Option(help="API key for --llm-url.", envvar="LLM_CATALYST_API_KEY", show_envvar=True),
]
NumCtx = Annotated[
    int, typer.Option(help="The LLM's context in tokens; keep it for a whole study.")
]


def run() -> int:
    """Runs the command line and returns the exit code."""
    # What matters of Optuna's warnings the commands say themselves, without tracebacks.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        app()
    except CatalystError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 1
    return 0


@app.command()
def tune(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder with train.jsonl, validation.jsonl, test.jsonl and card.json; or the "
            "word demo for the customer-support messages that come with the package."
        ),
    ],
    storage: Storage = "sqlite:///catalyst.db",
    study_name: StudyName = "prompt-tuning",
    model: Annotated[str, typer.Option(help="Frozen encoder: a folder or a name.")] = (
        DEFAULT_MODEL
    ),
    model_type: Annotated[
        ModelType, typer.Option(help="How the encoder classifies.")
    ] = ModelType.DUAL_ENCODER,
    num_virtual_tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 8,
    stages: Annotated[int, typer.Option(help="Stages to run now, on top of finished ones.")] = 10,
    steps: Annotated[int, typer.Option(help="Optimiser steps a stage.")] = 60,
    lr: Annotated[float, typer.Option(help="Learning rate of the prompt.")] = 5e-3,
    eval_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 10,
    refine_steps: Annotated[
        int, typer.Option(help="Steps of one last, long stage that continues the best; 0: none.")
    ] = 0,
    shots: Annotated[
        int, typer.Option(help="Train and validate on so many examples a label; 0: on all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    llm: LLM = "auto",
    llm_url: LLMUrl = "",
    llm_api_key: LLMKey = "",
    llm_timeout: Annotated[
        float, typer.Option(help="Seconds for one proposal, loading and retries included.")
    ] = DEFAULT_TIMEOUT_S,
    num_ctx: NumCtx = DEFAULT_NUM_CTX,
    sections: Annotated[str, typer.Option(help=_SECTIONS_HELP)] = ",".join(DEFAULT_SECTIONS),
    share_examples: Annotated[
        bool,
        typer.Option(
            "--share-examples",
            help="Show texts of the task to the LLM and keep them in the study. Off by default: "
            "they leave the training process.",
        ),
    ] = False,
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch", help="Ask for the next restart while a stage trains; saves time."
        ),
    ] = False,
    task_description: Annotated[
        str, typer.Option(help="What the LLM is told of the task. Default: from card.json.")
    ] = "",
    startup_prompt: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Text of a first stage; may be given several times."),
    ] = None,
    n_startup_trials: Annotated[
        int, typer.Option(help="Stages before the first proposal; random words by default.")
    ] = 3,
    n_candidates: Annotated[int, typer.Option(help="Candidates a proposal.")] = 4,
    top_k: Annotated[int, typer.Option(help="Prompts of the history that a proposal sees.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Tune a prompt: run stages, each restarted where the LLM proposes. Resumes a study."""
    options = TuneOptions(
        data=data,
        storage=storage,
        study_name=study_name,
        model=model,
        model_type=model_type,
        num_virtual_tokens=num_virtual_tokens,
        stages=stages,
        steps=steps,
        lr=lr,
        eval_every=eval_every,
        refine_steps=refine_steps,
        shots=shots,
        seed=seed,
        llm=LLMOptions(llm, llm_url, llm_api_key, num_ctx, device),
        llm_timeout=llm_timeout,
        sections=_names(sections),
        share_examples=share_examples,
        prefetch=prefetch,
        task_description=task_description,
        startup_prompts=tuple(startup_prompt or ()),
        n_startup_trials=n_startup_trials,
        n_candidates=n_candidates,
        top_k=top_k,
        device=device,
        artifacts=artifacts,
    )
    code = tune_command.tune(options, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def show(
    storage: Storage = "sqlite:///catalyst.db",
    study_name: StudyName = "prompt-tuning",
    trial: Trial = None,
    as_json: Json = False,
) -> None:
    """Show the stages of a study, or the story of one."""
    show_command.show(storage, study_name, trial_number=trial, as_json=as_json)


@app.command("meta-prompt")
def meta_prompt(
    storage: Storage = "sqlite:///catalyst.db",
    study_name: StudyName = "prompt-tuning",
    sections: Annotated[
        str, typer.Option(help=f"{_SECTIONS_HELP} Default: as tune was last told.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Print what the LLM would be asked for the next stage, and how long it is."""
    meta_prompt_command.print_meta_prompt(storage, study_name, _names(sections), as_json=as_json)


@app.command()
def export(
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Folder for the soft prompt; made if need be."),
    ] = None,
    replies: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="JSONL file for the LLM's replies, to repeat: tune --llm replay:FILE"),
    ] = None,
    storage: Storage = "sqlite:///catalyst.db",
    study_name: StudyName = "prompt-tuning",
    trial: Trial = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Export the soft prompt of the best stage or of another, or the LLM's replies."""
    export_command.export(
        output,
        replies,
        storage,
        study_name,
        trial_number=trial,
        artifacts=artifacts,
        as_json=as_json,
    )


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Frozen encoder: a folder or a name.")] = (
        DEFAULT_MODEL
    ),
    llm: LLM = "auto",
    llm_url: LLMUrl = "",
    llm_api_key: LLMKey = "",
    num_ctx: NumCtx = DEFAULT_NUM_CTX,
    as_json: Json = False,
) -> None:
    """Check what is installed and reachable, and try the LLM. Exit code 1 if tuning cannot run."""
    options = LLMOptions(llm, llm_url, llm_api_key, num_ctx)
    raise typer.Exit(doctor_command.doctor(model, options, as_json=as_json))


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())
