"""``tune``: from a folder of labelled texts to a trained prompt, stage by stage."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import replace
import hashlib
from pathlib import Path

import optuna

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import prompt_tuning
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.cli import meta_prompt
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import recipe
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli import studies
from optuna_llm_catalyst.cli import task_models
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.options import sections_of
from optuna_llm_catalyst.cli.progress import keep_unsaved
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.cli.results import print_results
from optuna_llm_catalyst.cli.run_stages import run_stages
from optuna_llm_catalyst.cli.task import described
from optuna_llm_catalyst.cli.task import load_task
from optuna_llm_catalyst.cli.task import recorded_replies
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.planner import Screen
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
from optuna_llm_catalyst.prompt_tuning.finding import Found
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.proposers.phrases import MAX_EXAMPLE
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.study_check import check_trials


_MAX_EXAMPLES = 12


def run(options: TuneOptions) -> int:
    """Runs stages and reports; returns the exit code."""
    sections = sections_of(options.sections)
    task, found = load_task(options)
    for line in found:
        output.say(line)
    provider, line = choose_llm(options, device=options.device, recorded=recorded_replies(options))
    options, found_model = task_models.with_model_type(options)
    progress = StageProgress(options)
    model, objective = _model_and_objective(options, task, found_model, progress)
    objective.prompts.check()
    study = studies.open_study(
        options.storage,
        options.study_name,
        metric=options.metric,
        direction=objective.direction,
    )
    study.pruner = recipe.pruner(options)
    with studies.storage_errors(options.storage, study):
        n_finished, resumed = _resume(study, objective, options, model)
        told = MetaPromptOptions(
            task_description=described(task, options),
            labels=task.labels,
            examples=_examples(task) if options.share_examples else (),
            mechanism=model.mechanism,
            n_validation=len(task.validation),
            n_stages=n_finished + max(options.stages, 1),
            sections=sections,
        )
        _equip(study, objective, options, provider, told)
    output.say(line)
    if options.share_examples:
        output.say("Examples are kept in the study and shown to the LLM (--share-examples).")
    code, problem = 0, None
    try:
        code = run_stages(study, objective, options, progress)
    except (CheckpointError, StudyMismatchError) as error:
        problem = error
        if not progress.n_finished:
            raise
    finally:
        keep_unsaved(objective, options.artifacts)
    with studies.storage_errors(options.storage, study):
        print_results(study, objective, options, resumed=resumed)
    if problem is not None:
        raise problem
    if progress.n_finished and progress.n_failed == progress.n_finished:
        output.say(f"error: all {progress.n_finished} stages of this command failed, see above.")
        code = code or 2
    return code


def _model_and_objective(
    options: TuneOptions, task: prompt_tuning.Task, found: Found, progress: StageProgress
) -> tuple[TaskModel, prompt_tuning.PromptTuningObjective]:
    model, pretrained = task_models.make(options, task, found)
    recipe.check_refining(options)
    make_stage = recipe.make_stage(options)
    objective = prompt_tuning.PromptTuningObjective(
        model,
        task,
        PromptSpace(pretrained.tokenizer, options.num_virtual_tokens),
        metric=options.metric,
        stage=None if make_stage else recipe.stage(options),
        make_stage=make_stage,
        prompt_kind=recipe.prompt_kind(options),
        n_text_prompts=recipe.n_text_prompts(options),
        text_stage=recipe.text_stage(options),
        later_texts=options.later_texts,
        seed=options.seed,
        artifact_store=folder_store(options.artifacts),
        share_examples=options.share_examples,
        observe=progress.evaluated,
    )
    return model, objective


def _equip(
    study: optuna.Study,
    objective: prompt_tuning.PromptTuningObjective,
    options: TuneOptions,
    provider: Provider | None,
    told: MetaPromptOptions,
) -> None:
    """Gives the study its sampler, and keeps what `meta-prompt` needs to say what the LLM sees."""
    proposer = None
    if provider is not None:
        proposer = LLMProposer(provider, **vars(told), timeout=options.llm_timeout)
    # The LLM was reached a moment ago: what failed before says nothing now. Replies that are
    # replayed fail as they did.
    is_reached = provider is not None and not isinstance(provider, ReplayProvider)
    n_trials = len(records.all_trials(study)) if is_reached else 0
    study.sampler = _sampler(options, objective, told, proposer, n_trials)
    setup = meta_prompt.MetaPromptSetup(
        model=options.model,
        num_virtual_tokens=options.num_virtual_tokens,
        n_candidates=options.n_candidates,
        top_k=options.top_k,
        max_tokens=proposer.max_meta_prompt_tokens if proposer else None,
        options=told,
        screened=options.screen != "none",
    )
    study.set_user_attr(meta_prompt.SETUP, asdict(setup))


def _sampler(
    options: TuneOptions,
    objective: prompt_tuning.PromptTuningObjective,
    told: MetaPromptOptions,
    proposer: LLMProposer | None,
    ignore_failures_before: int,
) -> LLMCatalystSampler:
    for text in options.startup_prompt:
        prompt = objective.space.from_text(text)
        if prompt.n_truncated:
            output.say(
                f"--startup-prompt {text!r} is {prompt.n_truncated} tokens too long: the stage "
                f"starts from {prompt.text!r}. Raise --num-virtual-tokens to keep all of it."
            )
    return LLMCatalystSampler(
        objective.space,
        task_description=told.task_description,
        labels=told.labels,
        proposer=proposer,
        startup=options.startup,
        n_startup_trials=options.n_startup_trials,
        startup_prompts=options.startup_prompt,
        n_candidates=options.n_candidates,
        top_k=options.top_k,
        prefetch=options.prefetch,
        screen=_screen(options, objective),
        seed=options.seed,
        ignore_failures_before=ignore_failures_before,
    )


def _screen(options: TuneOptions, objective: prompt_tuning.PromptTuningObjective) -> Screen | None:
    screens: dict[str, Screen | None] = {
        "own": objective.score,
        "ensemble": objective.score_in_ensemble,
        "none": None,
    }
    return screens[options.screen]


def _resume(
    study: optuna.Study,
    objective: prompt_tuning.PromptTuningObjective,
    options: TuneOptions,
    model: TaskModel,
) -> tuple[int, bool]:
    """Checks that the study can go on with these options; says and returns what it finds."""
    trials = records.all_trials(study)
    studies.check_ours(study, objective.space.param_names)
    check_trials(objective.space, trials)
    kind = recipe.prompt_kind(options)
    setup = {
        "--model": options.model,
        "--model-type": options.model_type,
        "--prompt-position": options.prompt_position or "behind_cls",
        "--template": options.template,
        "--verbalizer": sorted(options.verbalizer),
        "--prompt-kind": kind.name,
        "--rank": getattr(kind, "rank", None),
        "--shots": options.shots,
        "--metric": options.metric,
        "data with checksum": _checksum(objective.task),
        # Last: it differs wherever another of these does.
        "model with fingerprint": model.fingerprint,
    }
    studies.check_setup(study, setup)
    finished = [trial for trial in trials if trial.state in records.FINISHED]
    # Stages that were trained in another way are not comparable by their losses.
    settings = recipe.settings(options, model)
    last = next(filter(None, map(report.settings_to_compare, reversed(finished))), settings)
    changed = [name for name in settings if last.get(name) != settings[name]]
    if changed:
        before, now = (report.listed({n: s.get(n) for n in changed}) for s in (last, settings))
        output.say(
            f"The last stage was trained with {before}, this command trains with {now}: compare "
            "their losses with care."
        )
    dead = prompt_tuning.fail_dead_trials(study)
    if finished or dead:
        output.say(f"Resuming study {study.study_name!r} with {len(finished)} finished stages.")
    for number in dead:
        output.say(f"Stage {number} was cut off when its process died: marked as failed.")
    return len(finished), bool(finished or dead)


def _checksum(task: prompt_tuning.Task) -> str:
    """Changes with the examples that train and select, not with the test split."""
    splits = [task.train, task.validation]
    if task.of_images:  # The folder may be called otherwise from elsewhere.
        splits = [tuple(replace(e, text=Path(e.text).name) for e in split) for split in splits]
    text = repr((task.labels, *splits))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _examples(task: prompt_tuning.Task) -> list[tuple[str, str]]:
    """The first training example of each label, of a dozen labels at most."""
    first = {example.label: example for example in reversed(task.train)}
    return [
        # One character more than is shown, so that the cut is shown, too.
        (" / ".join(filter(None, [e.text, e.text_pair]))[: MAX_EXAMPLE + 1], task.labels[e.label])
        for _, e in sorted(first.items())
    ][:_MAX_EXAMPLES]
