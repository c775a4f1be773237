"""What a stage needs before it runs: its method, its plan, its restart prompt and its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.trial import BaseTrial
from optuna.trial import Trial

from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.prompt_tuning import checks
from optuna_llm_catalyst.prompt_tuning import refining
from optuna_llm_catalyst.prompt_tuning import stage_records
from optuna_llm_catalyst.prompt_tuning import text_prompts
from optuna_llm_catalyst.prompt_tuning import workers
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.refining import Refinement
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlan
from optuna_llm_catalyst.prompt_tuning.stage_plan import StagePlanner
from optuna_llm_catalyst.prompt_tuning.stages import Stage


@dataclass(frozen=True, eq=False)
class ReadyStage:
    """A stage that can run.

    Attributes:
        trial: Its trial.
        stage: What it does.
        prompt: The restart prompt.
        start: What it trains, with ``P = 1``.
        plan: What it reads.
        passes: Counts the trial's passes.
        patience: Evaluations in a row without a better one after which the stage ends, whatever
            its own patience is; None for as many as it has.
    """

    trial: BaseTrial
    stage: Stage
    prompt: RestartPrompt
    start: Prompt
    plan: StagePlan
    passes: Passes
    patience: int | None = None


class StageSetup:
    """Makes trials ready, for an objective whose arguments of the same names these are.

    Args:
        model: The frozen model.
        space: The space of prompts.
        plans: Decides how stages read texts.
        metric: What the value of a stage is.
        kind: The kind of prompt that is trained.
        make_stage: From a trial to what it does.
        text_stage: What a trial does that trains a text prompt, too.
    """

    def __init__(
        self,
        model: TaskModel,
        space: PromptSpace,
        plans: StagePlanner,
        *,
        metric: Metric,
        kind: PromptKind,
        make_stage: Callable[[BaseTrial], Stage],
        text_stage: Stage,
    ) -> None:
        self._model = model
        self._space = space
        self._plans = plans
        self._metric = metric
        self._kind = kind
        self._make_stage = make_stage
        self._text_stage = text_stage

    def planned(self, trial: BaseTrial) -> Callable[[Passes], ReadyStage]:
        """Decides what a trial reads, and returns what makes it ready once passes are counted.

        Splits are encoded here, once for all stages: that is no stage's cost. A sampler that
        screens does so at the first suggestion: its passes are the trial's, too.
        """
        study = trial.study if isinstance(trial, Trial) else None
        if study is not None:
            checks.check_study(study, trial.number, self._model, self._metric, self._kind)
        workers.claim(trial)
        refinement = refining.load(trial) if study else None
        plan, start = self._plan(study, trial.number, refinement)
        if plan.reading.is_trained:
            text_prompts.mark(trial)
        return lambda passes: self._ready(trial, plan, start, refinement, passes)

    def _plan(
        self, study: optuna.Study | None, number: int, refinement: Refinement | None
    ) -> tuple[StagePlan, Prompt | None]:
        """What a trial reads, and where it goes on if it refines another."""
        if study is None or refinement is None:
            return self._plans.next(study, number), None
        return self._plans.continued(study, refinement.refined_from)

    def _ready(
        self,
        trial: BaseTrial,
        plan: StagePlan,
        start: Prompt | None,
        refinement: Refinement | None,
        passes: Passes,
    ) -> ReadyStage:
        prompt, is_trained = self._space.suggest(trial), plan.reading.is_trained
        stage = self._text_stage if is_trained else self._make_stage(trial)
        if start is None:
            kind = on_both_sides(self._kind) if is_trained else self._kind
            start = self._model.start([prompt.token_ids], plan.train, kind)
        refined_from, patience = None, None
        if refinement is not None:
            stage = stage.with_budget(refinement.budget)
            refined_from, patience = refinement.refined_from, refinement.patience
        stage_records.record_stage(
            trial,
            stage,
            self._model,
            plan.reading.text_prompt,
            refined_from,
            self._metric,
            self._kind,
        )
        return ReadyStage(trial, stage, prompt, start, plan, passes, patience)
