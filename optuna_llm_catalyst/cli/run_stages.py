"""The stages of one ``tune``, and the refining of the best."""

from __future__ import annotations

import math
import signal
import time

import optuna
import torch

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import studies
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import refining


#: Evaluations without a better one that end refining, unless ``--patience`` is given.
_REFINE_PATIENCE = 3


def run_stages(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    progress: StageProgress,
) -> int:
    """Runs the stages; returns the exit code."""
    try:
        with studies.storage_errors(options.storage, study), progress.bar:
            is_late = _optimize(study, objective, options, progress)
            if options.refine_steps and not is_late:
                _refine(study, objective, options, progress)
    except KeyboardInterrupt:
        output.say("Interrupted: this stage is lost, the same command goes on with the next.")
        return 128 + signal.SIGINT
    except CatalystError:
        raise
    # A ValueError: of what somebody enqueued, or of a trial that somebody else ended.
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        raise output.UserError(
            f"this stage is lost, the same command goes on with the next: {first_line(error)}"
        ) from error
    return 0


def _optimize(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    progress: StageProgress,
) -> bool:
    """Runs the stages; says and returns whether something was left out for want of time."""
    ends = math.inf if options.timeout is None else time.monotonic() + options.timeout
    if options.stages_at_once == 1:
        study.optimize(
            objective,
            n_trials=options.stages,
            timeout=options.timeout,
            callbacks=[progress.finished],
        )
    else:
        while progress.n_finished < options.stages and time.monotonic() < ends:
            n_trials = min(options.stages_at_once, options.stages - progress.n_finished)
            objective.run_batch(study, n_trials, callbacks=[progress.finished])
    if time.monotonic() < ends:
        return False
    left_out = "the best was not refined" if options.refine_steps else ""
    if progress.n_finished < options.stages:
        ran = f"{progress.n_finished} of {options.stages} stages were run"
        left_out = ", ".join(filter(None, [ran, left_out]))
    if left_out:
        output.say(f"--timeout is over, after {options.timeout:g} seconds: {left_out}.")
    return True


def _refine(
    study: optuna.Study,
    objective: PromptTuningObjective,
    options: TuneOptions,
    progress: StageProgress,
) -> None:
    progress.refine(options.refine_steps)
    patience = options.patience or _REFINE_PATIENCE
    refined = objective.refine(study, n_steps=options.refine_steps, patience=patience)
    progress.finished(study, refined)
    output.say(refining.told(study, refined))
