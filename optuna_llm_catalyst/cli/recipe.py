"""How ``tune`` trains: its stages, what is chosen for each of them, and which are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import BaseTrial

from optuna_llm_catalyst.cli.options import TuneOptions
from optuna_llm_catalyst.cli.output import UserError
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.objective import TEXT_STAGE
from optuna_llm_catalyst.prompt_tuning.stage_records import settings_of


#: The largest learning rate that can be given.
_MAX_LR = 1e38


def _lr(trial: BaseTrial, options: TuneOptions) -> float:
    return trial.suggest_float("lr", options.lr / 5, min(options.lr * 5, _MAX_LR), log=True)


def _schedule(trial: BaseTrial, options: TuneOptions) -> str:
    return str(trial.suggest_categorical("schedule", ["constant", "cosine"]))


#: What can be chosen for each stage: fields of :class:`GradientStage`.
SEARCHED: dict[str, Callable[[BaseTrial, TuneOptions], Any]] = {"lr": _lr, "schedule": _schedule}


def searched(options: TuneOptions) -> tuple[str, ...]:
    """The names given with ``--search``, each once."""
    names = [name.strip() for listed in options.search for name in listed.split(",")]
    for name in names:
        if name not in SEARCHED:
            raise UserError(f"--search {name!r} is none of {', '.join(SEARCHED)}.")
    return tuple(dict.fromkeys(names))


def stage(options: TuneOptions) -> GradientStage:
    """A stage as the options say."""
    return GradientStage(
        n_steps=options.steps,
        lr=options.lr,
        eval_every=options.eval_every,
        schedule=options.schedule,
        patience=options.patience,
    )


def make_stage(options: TuneOptions) -> Callable[[BaseTrial], GradientStage] | None:
    """A function from a trial to its stage; None if all trials have the same."""
    names, common = searched(options), stage(options)

    def make(trial: BaseTrial) -> GradientStage:
        return replace(common, **{name: SEARCHED[name](trial, options) for name in names})

    return make if names else None


def text_stage(options: TuneOptions) -> GradientStage:
    """A stage that trains a text prompt, as the options say."""
    return replace(
        TEXT_STAGE,
        n_steps=options.steps if options.text_steps is None else options.text_steps,
        text_lr=options.text_lr,
        eval_every=options.eval_every,
        patience=options.patience or TEXT_STAGE.patience,
    )


def settings(options: TuneOptions, model: TaskModel) -> dict[str, Any]:
    """The settings that all stages share but those that train a text prompt."""
    names = searched(options)
    return {k: v for k, v in settings_of(stage(options), model).items() if k not in names}


def pruner(options: TuneOptions) -> BasePruner:
    """A pruner for stages of few evaluations.

    Each stage has a third of its steps to itself. ``median`` then ends those that are behind the
    median of the finished ones, once there are five; ``hyperband`` lets the better half go on
    there and, in one of its two brackets, at two thirds.
    """
    # Stages that start elsewhere say little about each other: no pruning by default.
    if options.pruner == "none":
        return optuna.pruners.NopPruner()
    least = max(options.eval_every, options.steps // 3)
    if options.pruner == "median":
        # A stage that ended early has no value at later steps: a median of one or two says less.
        return optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=least, n_min_trials=3
        )
    return optuna.pruners.HyperbandPruner(
        min_resource=least, max_resource=max(options.steps, least), reduction_factor=2
    )
