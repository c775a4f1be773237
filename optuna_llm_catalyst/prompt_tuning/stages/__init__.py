"""Restart prompt to trained prompt: one method a file, behind one Protocol."""

from optuna_llm_catalyst.prompt_tuning.stages.base import BatchStage
from optuna_llm_catalyst.prompt_tuning.stages.base import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages.base import needs_gradient
from optuna_llm_catalyst.prompt_tuning.stages.base import Observer
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import Stage
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult
from optuna_llm_catalyst.prompt_tuning.stages.black_box import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages.contrastive import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning.stages.distilled import DistilledStage
from optuna_llm_catalyst.prompt_tuning.stages.gradient import bucketed_batches
from optuna_llm_catalyst.prompt_tuning.stages.gradient import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages.zeroth_order import ZerothOrderStage


__all__ = [
    "BatchStage",
    "BlackBoxStage",
    "ContrastiveStage",
    "DistilledStage",
    "Evaluation",
    "GradientStage",
    "Observer",
    "Run",
    "Stage",
    "StageResult",
    "ZerothOrderStage",
    "bucketed_batches",
    "needs_gradient",
]
