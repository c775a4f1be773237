"""``tune``: from a folder of labelled texts to a trained prompt, stage by stage."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from enum import Enum
import hashlib
import importlib.resources
from pathlib import Path
import shlex
import shutil
import sys
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.cli.studies import check_setup
from optuna_llm_catalyst.cli.studies import open_study
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.exceptions import first_line


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
    from optuna_llm_catalyst.prompt_tuning import Task
    from optuna_llm_catalyst.prompt_tuning.models import TaskModel
    from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

DEMO = "demo"
_INTERRUPTED = 130


class ModelType(str, Enum):
    """How the frozen encoder classifies."""

    DUAL_ENCODER = "dual-encoder"
    SEQUENCE_CLASSIFIER = "sequence-classifier"


@dataclass(frozen=True)
class TuneOptions:
    """The options of ``tune``, named as on the command line."""

    data: str
    storage: str
    study_name: str
    model: str
    model_type: ModelType
    num_virtual_tokens: int
    stages: int
    steps: int
    lr: float
    eval_every: int
    refine_steps: int
    shots: int
    seed: int
    llm: str
    task_description: str
    startup_prompts: tuple[str, ...]
    n_startup_trials: int
    n_candidates: int
    device: str
    artifacts: Path


def tune(options: TuneOptions, *, as_json: bool) -> int:
    """Runs stages and reports; returns the exit code."""
    from torch import OutOfMemoryError

    # Messages go to stderr, so that stdout is the report alone.
    console = Console(stderr=True, highlight=False)
    task = _task(options)
    chosen_llm = choose_llm(options.llm)
    progress = StageProgress(
        console,
        stages=options.stages,
        steps=options.steps,
        refine_steps=options.refine_steps,
    )
    objective, sampler = _build(options, task, chosen_llm.provider, progress)
    study = open_study(options.storage, options.study_name, sampler)
    resumed = _resume(study, objective, options, task, console)
    console.print(report.printable(chosen_llm.line), soft_wrap=True, markup=False)
    code = 0
    try:
        with progress.shown():
            study.optimize(objective, n_trials=options.stages, callbacks=[progress.finished])
            if options.refine_steps:
                refined = objective.refine(study, n_steps=options.refine_steps)
                progress.finished(study, refined)
    except KeyboardInterrupt:
        console.print("Interrupted: this stage is lost, the same command goes on with the next.")
        code = _INTERRUPTED
    except (MemoryError, SQLAlchemyError, StorageInternalError, OutOfMemoryError) as error:
        raise UserError(
            f"this stage is lost, the same command goes on with the next: {first_line(error)}"
        ) from error
    _report(study, objective, options, resumed=resumed, as_json=as_json)
    return code


def _task(options: TuneOptions) -> Task:
    from optuna_llm_catalyst.prompt_tuning.data import few_shot
    from optuna_llm_catalyst.prompt_tuning.data import load_task

    for name in ("stages", "steps", "refine_steps", "shots", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0.")
    folder = Path(options.data)
    if options.data == DEMO and not folder.is_dir():
        folder = Path(str(importlib.resources.files("optuna_llm_catalyst") / "demo"))
        folder = folder / "customer_support"
    task = load_task(folder)
    if options.shots:
        return few_shot(task, options.shots, options.seed)
    if not task.validation:
        raise UserError(
            f"{folder}: there is no validation.jsonl: add one, or draw train and validation "
            "from train.jsonl with --shots 16."
        )
    return task


def _build(
    options: TuneOptions, task: Task, llm: Any, progress: StageProgress
) -> tuple[PromptTuningObjective, LLMCatalystSampler]:
    """The objective and the sampler of the options."""
    from optuna_llm_catalyst.prompt_tuning import GradientStage
    from optuna_llm_catalyst.prompt_tuning import load_pretrained
    from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
    from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store

    with user_input():
        stage = GradientStage(n_steps=options.steps, lr=options.lr, eval_every=options.eval_every)
    pretrained = load_pretrained(options.model, device=_device(options.device))
    progress.console.print(
        f"Model {pretrained.name} from {pretrained.source}.", markup=False, soft_wrap=True
    )
    with user_input():
        space = PromptSpace(pretrained.tokenizer, options.num_virtual_tokens)
        model = _classifier(options, pretrained, task)
        objective = PromptTuningObjective(
            model,
            task,
            space,
            stage=stage,
            seed=options.seed,
            artifact_store=folder_store(options.artifacts),
            observe=progress.evaluated,
        )
        sampler = LLMCatalystSampler(
            space,
            llm=llm,
            task_description=options.task_description or _description(task),
            n_startup_trials=max(options.n_startup_trials, len(options.startup_prompts)),
            startup_prompts=options.startup_prompts,
            n_candidates=options.n_candidates,
            screen=objective.score,
            seed=options.seed,
        )
    return objective, sampler


def _classifier(options: TuneOptions, pretrained: Pretrained, task: Task) -> TaskModel:
    from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
    from optuna_llm_catalyst.prompt_tuning import SequenceClassifier

    encoder, tokenizer, name = pretrained.encoder, pretrained.tokenizer, pretrained.name
    if options.model_type == ModelType.DUAL_ENCODER:
        return DualEncoderClassifier(encoder, tokenizer, task.labels, name=name)
    return SequenceClassifier(
        encoder,
        tokenizer,
        task.labels,
        name=name,
        max_virtual_tokens=options.num_virtual_tokens,
    )


def _resume(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    task: Task,
    console: Console,
) -> bool:
    """Checks that the study can go on with these options and says what it finds."""
    from optuna_llm_catalyst.prompt_tuning import fail_dead_trials

    objective.space.check(records.all_trials(study))
    check_setup(
        study,
        {
            "--model": options.model,
            "--model-type": options.model_type.value,
            "--shots": options.shots,
            "data with checksum": _checksum(task),
        },
    )
    dead = fail_dead_trials(study)
    finished = (TrialState.COMPLETE, TrialState.PRUNED)
    n_finished = sum(trial.state in finished for trial in records.all_trials(study))
    resumed = bool(n_finished or dead)
    if resumed:
        console.print(
            f"Resuming study {study.study_name!r} with {n_finished} finished stages.",
            markup=False,
        )
    for number in dead:
        console.print(f"Stage {number} was cut off when its process died: marked as failed.")
    return resumed


def _report(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    *,
    resumed: bool,
    as_json: bool,
) -> None:
    rows = report.stage_rows(study)
    chosen, first = report.chosen(rows), report.first(rows)
    tested = {
        name: _test(study, objective, row.number)
        for name, row in (("chosen", chosen), ("first", first))
        if row is not None and objective.task.test
    }
    if as_json:
        document = {
            "study": study.study_name,
            "storage": options.storage,
            "resumed": resumed,
            "stages": [asdict(row) for row in rows],
            "chosen": chosen and chosen.number,
            "first": first and first.number,
            "test": tested,
        }
        report.print_json(document)
        return
    console = Console(highlight=False)
    console.print(report.stage_table(rows))
    if chosen is not None and first is not None:
        console.print(f"Chosen by validation loss: stage {chosen.number}.")
        for name, row in (("chosen", chosen), ("first", first)):
            score = tested.get(name)
            if score is not None:
                console.print(_test_line(name, row, score))
    console.print(f"Next: {_dashboard_command(options)}", soft_wrap=True, markup=False)


def _test_line(name: str, row: report.StageRow, score: dict[str, Any]) -> str:
    return (
        f"  test accuracy of the {name} stage ({row.number}): {score['accuracy']:.1%} "
        f"on {score['n_examples']} examples"
    )


def _test(
    study: optuna.Study, objective: PromptTuningObjective, number: int
) -> dict[str, Any] | None:
    from optuna_llm_catalyst.prompt_tuning import load_soft_prompt

    try:
        trained = load_soft_prompt(
            study, trial_number=number, artifact_store=objective.artifact_store
        )
        score = objective.test(trained)
    except CheckpointError as error:
        print(f"warning: no test score: {error}", file=sys.stderr)
        return None
    return {"loss": score.loss, "accuracy": score.accuracy, "n_examples": score.n_examples}


def _description(task: Task) -> str:
    description = task.description or f"Classify texts ({task.name})."
    return f"{description} The labels are: {', '.join(task.labels)}."


def _checksum(task: Task) -> str:
    """Changes with the examples that train and select, not with the test split."""
    text = repr((task.labels, task.train, task.validation))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    return name


def _dashboard_command(options: TuneOptions) -> str:
    program = "optuna-dashboard"
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) is None and beside.exists():
        program = str(
            beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
        )
    return shlex.join([program, options.storage, "--artifact-dir", str(options.artifacts)])
