"""A frozen model with a task on top: one task model a file, behind one Protocol."""

from optuna_llm_catalyst.prompt_tuning.models.base import evaluate
from optuna_llm_catalyst.prompt_tuning.models.base import HasHead
from optuna_llm_catalyst.prompt_tuning.models.base import losses
from optuna_llm_catalyst.prompt_tuning.models.base import Metrics
from optuna_llm_catalyst.prompt_tuning.models.base import reads_images
from optuna_llm_catalyst.prompt_tuning.models.base import SOFT
from optuna_llm_catalyst.prompt_tuning.models.base import TaskModel
from optuna_llm_catalyst.prompt_tuning.models.black_box import BlackBoxModel
from optuna_llm_catalyst.prompt_tuning.models.black_box import over_http
from optuna_llm_catalyst.prompt_tuning.models.causal_lm import CausalLMClassifier
from optuna_llm_catalyst.prompt_tuning.models.clip import CLIPClassifier
from optuna_llm_catalyst.prompt_tuning.models.dual_encoder import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning.models.masked_lm import MaskedLMClassifier
from optuna_llm_catalyst.prompt_tuning.models.meter import Passes
from optuna_llm_catalyst.prompt_tuning.models.sequence_classifier import SequenceClassifier


#: The task models by the names that classifiers' files hold.
TASK_MODELS: dict[
    str,
    type[CausalLMClassifier]
    | type[CLIPClassifier]
    | type[DualEncoderClassifier]
    | type[MaskedLMClassifier]
    | type[SequenceClassifier],
] = {
    kind.__name__: kind
    for kind in (
        CausalLMClassifier,
        CLIPClassifier,
        DualEncoderClassifier,
        MaskedLMClassifier,
        SequenceClassifier,
    )
}

__all__ = [
    "SOFT",
    "TASK_MODELS",
    "BlackBoxModel",
    "CausalLMClassifier",
    "CLIPClassifier",
    "DualEncoderClassifier",
    "HasHead",
    "MaskedLMClassifier",
    "Metrics",
    "Passes",
    "SequenceClassifier",
    "TaskModel",
    "evaluate",
    "losses",
    "over_http",
    "reads_images",
]
