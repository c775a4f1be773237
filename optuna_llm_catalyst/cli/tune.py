"""``tune``: from a folder of labelled texts to a trained prompt, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
import hashlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from optuna_llm_catalyst import history
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.llms import LLMOptions
from optuna_llm_catalyst.cli.meta_prompt import MetaPromptSetup
from optuna_llm_catalyst.cli.meta_prompt import save_meta_prompt_setup
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.cli.results import print_results
from optuna_llm_catalyst.cli.studies import check_setup
from optuna_llm_catalyst.cli.studies import open_study
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider


if TYPE_CHECKING:
    from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
    from optuna_llm_catalyst.prompt_tuning import Task
    from optuna_llm_catalyst.prompt_tuning.models import TaskModel
    from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

DEMO = "demo"
_INTERRUPTED = 130
_MAX_EXAMPLES = 12


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
    llm: LLMOptions
    llm_timeout: float
    sections: tuple[str, ...]
    share_examples: bool
    prefetch: bool
    task_description: str
    startup_prompts: tuple[str, ...]
    n_startup_trials: int
    n_candidates: int
    top_k: int
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
    # One that is never asked can still show what an LLM would be asked.
    proposer = _proposer(options, task, chosen_llm.provider or ReplayProvider([]))
    asks = chosen_llm.provider is not None
    objective, sampler = _build(options, task, proposer if asks else None, progress)
    study = open_study(options.storage, options.study_name, sampler)
    resumed = _resume(study, objective, options, task, console)
    save_meta_prompt_setup(
        study,
        MetaPromptSetup(
            model=options.model,
            num_virtual_tokens=options.num_virtual_tokens,
            n_candidates=options.n_candidates,
            top_k=options.top_k,
            max_tokens=proposer.max_meta_prompt_tokens,
            options=proposer.options,
        ),
    )
    console.print(report.printable(chosen_llm.line), soft_wrap=True, markup=False)
    if options.share_examples:
        console.print("Examples are kept in the study and shown to the LLM (--share-examples).")
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
    print_results(
        study,
        objective,
        storage=options.storage,
        artifacts=options.artifacts,
        resumed=resumed,
        as_json=as_json,
    )
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


def _proposer(options: TuneOptions, task: Task, llm: Provider) -> LLMProposer:
    with user_input():
        return LLMProposer(
            llm,
            options.task_description or task.description or f"Classify texts ({task.name}).",
            labels=task.labels,
            examples=_examples(task) if options.share_examples else (),
            sections=options.sections,
            timeout=options.llm_timeout,
        )


def _build(
    options: TuneOptions, task: Task, proposer: LLMProposer | None, progress: StageProgress
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
            share_examples=options.share_examples,
            observe=progress.evaluated,
        )
        sampler = LLMCatalystSampler(
            space,
            proposer=proposer,
            n_startup_trials=max(options.n_startup_trials, len(options.startup_prompts)),
            startup_prompts=options.startup_prompts,
            n_candidates=options.n_candidates,
            top_k=options.top_k,
            prefetch=options.prefetch,
            screen=objective.score,
            seed=options.seed,
        )
    return objective, sampler


def _classifier(options: TuneOptions, pretrained: Pretrained, task: Task) -> TaskModel:
    from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
    from optuna_llm_catalyst.prompt_tuning import SequenceClassifier

    if options.model_type == ModelType.DUAL_ENCODER:
        return DualEncoderClassifier(pretrained, task.labels)
    return SequenceClassifier(
        pretrained,
        task.labels,
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

    history.check_trials(objective.space, records.all_trials(study))
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


def _examples(task: Task) -> list[tuple[str, str]]:
    """The first training example of each label, of a dozen labels at most."""
    first = {example.label: example for example in reversed(task.train)}
    return [
        (" / ".join(filter(None, [e.text, e.text_pair])), task.labels[e.label])
        for _, e in sorted(first.items())
    ][:_MAX_EXAMPLES]


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
