"""Everything that needs torch: stages of prompt tuning on frozen models, as an objective."""

from optuna_llm_catalyst.prompt_tuning.checkpoints import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.classifier import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.classifier_loading import load_classifier
from optuna_llm_catalyst.prompt_tuning.data import draw_splits
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.data import few_shot
from optuna_llm_catalyst.prompt_tuning.data import load_task
from optuna_llm_catalyst.prompt_tuning.data import Task
from optuna_llm_catalyst.prompt_tuning.data import task_from_table
from optuna_llm_catalyst.prompt_tuning.data import task_from_texts
from optuna_llm_catalyst.prompt_tuning.ensemble import load_prompt_ensemble
from optuna_llm_catalyst.prompt_tuning.ensemble import PromptEnsemble
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.metrics import of_predictions
from optuna_llm_catalyst.prompt_tuning.models import BlackBoxModel
from optuna_llm_catalyst.prompt_tuning.models import CausalLMClassifier
from optuna_llm_catalyst.prompt_tuning.models import CLIPClassifier
from optuna_llm_catalyst.prompt_tuning.models import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning.models import MaskedLMClassifier
from optuna_llm_catalyst.prompt_tuning.models import over_http
from optuna_llm_catalyst.prompt_tuning.models import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.objective import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.peft_export import write_peft
from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.projection import nearest
from optuna_llm_catalyst.prompt_tuning.projection import word_table
from optuna_llm_catalyst.prompt_tuning.prompts import DeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.stages import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning.stages import DistilledStage
from optuna_llm_catalyst.prompt_tuning.stages import GradientStage
from optuna_llm_catalyst.prompt_tuning.stages import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.workers import fail_dead_trials


__all__ = [
    "BlackBoxModel",
    "BlackBoxStage",
    "CLIPClassifier",
    "CausalLMClassifier",
    "ContrastiveStage",
    "DeepPrompt",
    "DistilledStage",
    "DualEncoderClassifier",
    "Example",
    "GradientStage",
    "LowRankPrompt",
    "MaskedLMClassifier",
    "Metric",
    "Pretrained",
    "Prompt",
    "PromptClassifier",
    "PromptEnsemble",
    "PromptTuningObjective",
    "SequenceClassifier",
    "SoftPrompt",
    "Task",
    "TrainedPrompt",
    "TwoSidedDeepPrompt",
    "TwoSidedLowRankPrompt",
    "TwoSidedPrompt",
    "ZerothOrderStage",
    "draw_splits",
    "fail_dead_trials",
    "few_shot",
    "load_classifier",
    "load_pretrained",
    "load_prompt_ensemble",
    "load_soft_prompt",
    "load_task",
    "nearest",
    "task_from_table",
    "task_from_texts",
    "of_predictions",
    "over_http",
    "word_table",
    "write_peft",
]
