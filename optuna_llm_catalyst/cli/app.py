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
from optuna_llm_catalyst.cli import show as show_command
from optuna_llm_catalyst.cli import tune as tune_command
from optuna_llm_catalyst.cli.report import printable
from optuna_llm_catalyst.cli.tune import ModelType
from optuna_llm_catalyst.cli.tune import TuneOptions
from optuna_llm_catalyst.exceptions import CatalystError


# As in `prompt_tuning`, whose import would load torch for every `--help`.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_ARTIFACTS = Path("llm_catalyst_artifacts")

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
    llm: Annotated[
        str,
        typer.Option(
            help="Who proposes restarts: auto (Ollama if it answers, else mutation), "
            "ollama:MODEL, mutation, or replay:FILE."
        ),
    ] = "auto",
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
        llm=llm,
        task_description=task_description,
        startup_prompts=tuple(startup_prompt or ()),
        n_startup_trials=n_startup_trials,
        n_candidates=n_candidates,
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


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Folder for the files; made if need be.")],
    storage: Storage = "sqlite:///catalyst.db",
    study_name: StudyName = "prompt-tuning",
    trial: Trial = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Export the trained soft prompt of the best stage, or of another."""
    export_command.export(
        output, storage, study_name, trial_number=trial, artifacts=artifacts, as_json=as_json
    )


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Frozen encoder: a folder or a name.")] = (
        DEFAULT_MODEL
    ),
    llm: Annotated[str, typer.Option(help="As for tune.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check what is installed and reachable. Exit code 1 if tuning cannot run."""
    raise typer.Exit(doctor_command.doctor(model, llm, as_json=as_json))
