"""How ``tune`` trains: its stages, what is chosen for each of them, and which are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from dataclasses import replace
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import BaseTrial

from optuna_llm_catalyst.cli.output import UserError
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import DistilledStage
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.objective import TEXT_STAGE
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stage_records import settings_of
from optuna_llm_catalyst.prompt_tuning.stages import Stage


#: The largest number that is searched.
_MOST = 1e38


def _near(trial: BaseTrial, name: str, value: float) -> float:
    return trial.suggest_float(name, value / 5, min(value * 5, _MOST), log=True)


def _lr(trial: BaseTrial, stage: Any) -> float:
    return _near(trial, "lr", stage.lr)


def _schedule(trial: BaseTrial, stage: Any) -> str:
    return str(trial.suggest_categorical("schedule", ["constant", "cosine"]))


def _alpha(trial: BaseTrial, stage: Any) -> float:
    return _near(trial, "alpha", stage.alpha)


def _intrinsic_dim(trial: BaseTrial, stage: Any) -> int:
    most = max(stage.intrinsic_dim, 2)
    return trial.suggest_int("intrinsic_dim", max(most // 10, 2), most, log=True)


def _gd_weight(trial: BaseTrial, stage: Any) -> float:
    return trial.suggest_float("gd_weight", 0.0, 1.0)


#: What can be chosen for each stage: its fields, with a function of the trial and the stage.
SEARCHED: dict[str, Callable[[BaseTrial, Any], Any]] = {
    "lr": _lr,
    "schedule": _schedule,
    "alpha": _alpha,
    "intrinsic_dim": _intrinsic_dim,
    "gd_weight": _gd_weight,
}


def searched(options: TuneOptions) -> tuple[str, ...]:
    """The names given with ``--search``, each once."""
    names = [name.strip() for listed in options.search for name in listed.split(",")]
    own = {field.name for field in fields(stage(options))}  # type: ignore[arg-type]
    known = [name for name in SEARCHED if name in own]
    for name in names:
        if name not in known:
            raise UserError(f"--search {name!r} is none of {', '.join(known)}.")
    return tuple(dict.fromkeys(names))


def _by_gradients(options: TuneOptions) -> bool:
    return options.stage in ("gradient", "contrastive")


def _check_gradients(options: TuneOptions) -> None:
    """Refuses what only stages with gradients have, in one without."""
    if _by_gradients(options):
        return
    given = {
        "--schedule": options.schedule != TuneOptions.schedule,
        "--patience": options.patience is not None and not options.refine_steps,
        "--text-steps": options.text_steps is not None,
        "--text-lr": options.text_lr != TuneOptions.text_lr,
    }
    for name, is_given in given.items():
        if is_given:
            raise UserError(
                f"{name} needs a stage with gradients, this is --stage {options.stage}."
            )
    if options.stage != "zo" and options.lr is not None:
        raise UserError(f"--stage {options.stage} has no learning rate: leave --lr out.")


def check_refining(options: TuneOptions) -> None:
    """Refuses a last stage that cannot be, before the others are trained."""
    own: Any = stage(options)
    try:
        own.with_budget(options.refine_steps)
    except ValueError as error:
        raise UserError(f"--refine-steps {options.refine_steps}: {error}") from error


def stage(options: TuneOptions) -> Stage:
    """A stage as the options say."""
    _check_gradients(options)
    given = {"lr": options.lr, "eval_every": options.eval_every}
    common: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
    if _by_gradients(options):
        method = ContrastiveStage if options.stage == "contrastive" else GradientStage
        return method(
            n_steps=options.steps, schedule=options.schedule, patience=options.patience, **common
        )
    if options.stage == "zo":
        return ZerothOrderStage(n_queries=options.queries, **common)
    searched: dict[str, Any] = {
        "n_queries": options.queries,
        "population_size": options.population_size,
        "intrinsic_dim": options.intrinsic_dim,
        "alpha": options.alpha,
        **common,
    }
    if options.stage == "gdfo":
        return DistilledStage(gd_weight=options.gd_weight, **searched)
    return BlackBoxStage(**searched)


def prompt_kind(options: TuneOptions) -> PromptKind:
    """The kind of prompt that the options say."""
    if options.prompt_kind == "lowrank":
        return _lowrank(options)
    if options.rank is not None:
        raise UserError("--rank needs --prompt-kind lowrank.")
    wanted = {"bbt": "soft", "bbtv2": "deep"}.get(options.stage, options.prompt_kind or "soft")
    if options.prompt_kind not in (None, wanted):
        other = "bbtv2" if options.stage == "bbt" else "bbt"
        raise UserError(
            f"--stage {options.stage} has {wanted} prompts: for {options.prompt_kind} ones take "
            f"--stage {other}."
        )
    return DeepPrompt() if wanted == "deep" else SoftPrompt()


def _lowrank(options: TuneOptions) -> LowRankPrompt:
    if not _by_gradients(options):
        raise UserError(
            "--prompt-kind lowrank is trained by gradients only: take --stage gradient, this is "
            f"--stage {options.stage}."
        )
    return LowRankPrompt() if options.rank is None else LowRankPrompt(rank=options.rank)


def make_stage(options: TuneOptions) -> Callable[[BaseTrial], Stage] | None:
    """A function from a trial to its stage; None if all trials have the same."""
    names, common = searched(options), stage(options)

    def make(trial: BaseTrial) -> Stage:
        chosen = {name: SEARCHED[name](trial, common) for name in names}
        return replace(common, **chosen)  # type: ignore[type-var]

    return make if names else None


def n_text_prompts(options: TuneOptions) -> int | None:
    """Text prompts that the study keeps; None for as many as the model has by default."""
    # Without gradients each query of one would read all texts again.
    is_cheap = _by_gradients(options) or options.text_prompts is not None
    return options.text_prompts if is_cheap else 0


def text_stage(options: TuneOptions) -> Stage:
    """A stage that trains a text prompt, as the options say."""
    if not _by_gradients(options):
        return stage(options)
    given: dict[str, Any] = {"eval_every": options.eval_every} if options.eval_every else {}
    return replace(
        TEXT_STAGE,
        n_steps=options.steps if options.text_steps is None else options.text_steps,
        text_lr=options.text_lr,
        patience=options.patience or TEXT_STAGE.patience,
        **given,
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
    own: Any = stage(options)
    least = max(own.eval_every, own.budget // 3)
    if options.pruner == "median":
        # A stage that ended early has no value at later steps: a median of one or two says less.
        return optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=least, n_min_trials=3
        )
    return optuna.pruners.HyperbandPruner(
        min_resource=least, max_resource=max(own.budget, least), reduction_factor=2
    )
