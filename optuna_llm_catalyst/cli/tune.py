"""``tune``: from a folder of labelled texts to a trained prompt, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
from typing import Any

import optuna
from optuna.trial import FrozenTrial
import torch

from optuna_llm_catalyst import history
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import INTERRUPTED
from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.meta_prompt import MetaPromptSetup
from optuna_llm_catalyst.cli.meta_prompt import save_meta_prompt_setup
from optuna_llm_catalyst.cli.options import ModelType
from optuna_llm_catalyst.cli.options import names
from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.cli.results import print_results
from optuna_llm_catalyst.cli.studies import check_ours
from optuna_llm_catalyst.cli.studies import check_setup
from optuna_llm_catalyst.cli.studies import FINISHED
from optuna_llm_catalyst.cli.studies import open_study
from optuna_llm_catalyst.cli.studies import storage_errors
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import fail_dead_trials
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions


_MAX_EXAMPLES = 12


def run(options: TuneOptions) -> int:
    """Runs stages and reports; returns the exit code."""
    with user_input():
        check_sections(names(options.sections))
        task = _task(options)
    llm = choose_llm(options, device=options.device)
    progress = StageProgress(
        stages=options.stages, steps=options.steps, refine_steps=options.refine_steps
    )
    with user_input():
        model, objective = _model_and_objective(options, task, progress)
    objective.check_storage()
    study = open_study(options.storage, options.study_name)
    with storage_errors(options.storage, study):
        resumed = _resume(study, objective, options, model)
        n_finished = sum(trial.state in FINISHED for trial in records.all_trials(study))
        told = _told(options, task, model.mechanism, n_finished + max(options.stages, 1))
        with user_input():
            proposer = (
                LLMProposer(llm.provider, **vars(told), timeout=options.llm_timeout)
                if llm.provider
                else None
            )
            # The LLM was reached a moment ago: what failed before says nothing now. Replies that
            # are replayed fail as they did.
            reached = proposer is not None and not isinstance(llm.provider, ReplayProvider)
            n_trials = len(records.all_trials(study))
            study.sampler = _sampler(options, objective, proposer, n_trials if reached else 0)
        save_meta_prompt_setup(
            study,
            MetaPromptSetup(
                model=options.model,
                num_virtual_tokens=options.num_virtual_tokens,
                n_candidates=options.n_candidates,
                top_k=options.top_k,
                max_tokens=proposer.max_meta_prompt_tokens if proposer else None,
                options=told,
            ),
        )
    output.say(llm.line)
    if options.share_examples:
        output.say("Examples are kept in the study and shown to the LLM (--share-examples).")
    code = _run_stages(study, objective, options, progress)
    with storage_errors(options.storage, study):
        print_results(study, objective, options, resumed=resumed)
    if progress.n_finished and progress.n_failed == progress.n_finished:
        output.say(f"error: all {progress.n_finished} stages of this command failed, see above.")
        return 1
    return code


def _run_stages(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    progress: StageProgress,
) -> int:
    """Runs the stages; returns the exit code."""
    try:
        with storage_errors(options.storage, study), progress.shown():
            study.optimize(objective, n_trials=options.stages, callbacks=[progress.finished])
            if options.refine_steps:
                refined = objective.refine(study, n_steps=options.refine_steps)
                progress.finished(study, refined)
    except KeyboardInterrupt:
        output.say("Interrupted: this stage is lost, the same command goes on with the next.")
        return INTERRUPTED
    # A ValueError: of what somebody enqueued, or of a trial that somebody else ended.
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"this stage is lost, the same command goes on with the next: {first_line(error)}"
        ) from error
    return 0


def _task(options: TuneOptions) -> Task:
    task = load_task(options.data)
    if options.shots:
        return few_shot(task, options.shots, options.seed)
    if not task.validation:
        raise UserError(
            f"{options.data}: there is no validation.jsonl: add it, or draw train and validation "
            "from train.jsonl with --shots 16."
        )
    return task


def _model_and_objective(
    options: TuneOptions, task: Task, progress: StageProgress
) -> tuple[TaskModel, PromptTuningObjective]:
    stage = GradientStage(n_steps=options.steps, lr=options.lr, eval_every=options.eval_every)
    pretrained = load_pretrained(
        options.model,
        device=_device(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    output.say(f"Model {pretrained.name} from {pretrained.source}.")
    length = options.num_virtual_tokens
    model: TaskModel
    if options.model_type == ModelType.DUAL_ENCODER:
        model = DualEncoderClassifier(pretrained, task.labels)
    else:
        model = SequenceClassifier(pretrained, task.labels, max_virtual_tokens=length)
    objective = PromptTuningObjective(
        model,
        task,
        PromptSpace(pretrained.tokenizer, length),
        stage=stage,
        seed=options.seed,
        artifact_store=folder_store(options.artifacts),
        share_examples=options.share_examples,
        observe=progress.evaluated,
    )
    return model, objective


def _told(options: TuneOptions, task: Task, mechanism: str, n_stages: int) -> MetaPromptOptions:
    """What an LLM is told beside the history."""
    described = options.task_description or task.description
    return MetaPromptOptions(
        task_description=described or f"Classify texts ({task.name}).",
        labels=task.labels,
        examples=_examples(task) if options.share_examples else (),
        mechanism=mechanism,
        n_validation=len(task.validation),
        n_stages=n_stages,
        sections=names(options.sections),
    )


def _sampler(
    options: TuneOptions,
    objective: PromptTuningObjective,
    proposer: LLMProposer | None,
    ignore_failures_before: int,
) -> LLMCatalystSampler:
    for text in options.startup_prompt:
        _say_if_cut(text, objective.space)
    return LLMCatalystSampler(
        objective.space,
        proposer=proposer,
        n_startup_trials=max(options.n_startup_trials, len(options.startup_prompt), 1),
        startup_prompts=options.startup_prompt,
        n_candidates=options.n_candidates,
        top_k=options.top_k,
        prefetch=options.prefetch,
        screen=objective.score,
        seed=options.seed,
        ignore_failures_before=ignore_failures_before,
    )


def _say_if_cut(text: str, space: PromptSpace) -> None:
    prompt = space.from_text(text)
    if prompt.n_truncated:
        output.say(
            f"--startup-prompt {text!r} is {prompt.n_truncated} tokens too long: the stage "
            f"starts from {prompt.text!r}. Raise --num-virtual-tokens to keep all of it."
        )


def _resume(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    model: TaskModel,
) -> bool:
    """Checks that the study can go on with these options and says what it finds."""
    trials = records.all_trials(study)
    check_ours(study, objective.space.param_names)
    history.check_trials(objective.space, trials)
    check_setup(
        study,
        {
            "--model": options.model,
            "--model-type": options.model_type.value,
            "--shots": options.shots,
            "data with checksum": _checksum(objective.task),
            # Last: it differs wherever another of these does.
            "model with fingerprint": model.fingerprint,
        },
    )
    _say_if_settings_changed(trials, objective.stage_settings)
    dead = fail_dead_trials(study)
    n_finished = sum(trial.state in FINISHED for trial in trials)
    resumed = bool(n_finished or dead)
    if resumed:
        output.say(f"Resuming study {study.study_name!r} with {n_finished} finished stages.")
    for number in dead:
        output.say(f"Stage {number} was cut off when its process died: marked as failed.")
    return resumed


def _say_if_settings_changed(trials: Sequence[FrozenTrial], settings: dict[str, Any]) -> None:
    """Stages that were trained in another way are not comparable by their losses."""
    known = [report.stage_settings(trial) for trial in trials if trial.state in FINISHED]
    last = next(filter(None, reversed(known)), settings)
    changed = [name for name in settings if last.get(name) != settings[name]]
    if changed:
        before, now = ({n: s.get(n) for n in changed} for s in (last, settings))
        output.say(
            f"The last stage was trained with {report.listed(before)}, this command trains with "
            f"{report.listed(now)}: compare their losses with care."
        )


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
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Some devices, such as meta, hold no numbers.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    return name
