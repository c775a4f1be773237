"""What a stage trains: one kind of prompt a file, behind one Protocol."""

from optuna_llm_catalyst.prompt_tuning.prompts.base import HEAD_PREFIX
from optuna_llm_catalyst.prompt_tuning.prompts.base import is_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import place_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import Placement
from optuna_llm_catalyst.prompt_tuning.prompts.base import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts.base import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import stacked
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts.deep import DeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.deep import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.sides import both_sides
from optuna_llm_catalyst.prompt_tuning.prompts.sides import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts.sides import one_side
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt


#: The kinds by the names that checkpoints hold.
KINDS: dict[str, PromptKind] = {
    kind.name: kind
    for kind in (SoftPrompt(), DeepPrompt(), TwoSidedPrompt(), TwoSidedDeepPrompt())
}

__all__ = [
    "DeepPrompt",
    "HEAD_PREFIX",
    "KINDS",
    "Placement",
    "Prompt",
    "PromptKind",
    "Side",
    "SoftPrompt",
    "Tensors",
    "TwoSidedDeepPrompt",
    "TwoSidedPrompt",
    "both_sides",
    "is_of",
    "on_both_sides",
    "one_side",
    "place_of",
    "stacked",
]
