"""What a stage trains: one kind of prompt a file, behind one Protocol."""

from optuna_llm_catalyst.prompt_tuning.prompts.base import HEAD_PREFIX
from optuna_llm_catalyst.prompt_tuning.prompts.base import is_gate
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
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import sized
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.sides import both_sides
from optuna_llm_catalyst.prompt_tuning.prompts.sides import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts.sides import one_side
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt


#: The kinds by the names that checkpoints hold.
KINDS: dict[str, PromptKind] = {
    kind.name: kind
    for kind in (
        SoftPrompt(),
        DeepPrompt(),
        LowRankPrompt(),
        TwoSidedPrompt(),
        TwoSidedDeepPrompt(),
        TwoSidedLowRankPrompt(),
    )
}


def kind_of(name: str, tensors: Tensors) -> PromptKind:
    """The kind of a name, with the rank of a prompt's tensors where it has one."""
    kind = KINDS[name]
    return sized(kind, tensors) if isinstance(kind, LowRankPrompt) else kind


__all__ = [
    "DeepPrompt",
    "HEAD_PREFIX",
    "KINDS",
    "LowRankPrompt",
    "Placement",
    "Prompt",
    "PromptKind",
    "Side",
    "SoftPrompt",
    "Tensors",
    "TwoSidedDeepPrompt",
    "TwoSidedLowRankPrompt",
    "TwoSidedPrompt",
    "both_sides",
    "is_gate",
    "is_of",
    "kind_of",
    "on_both_sides",
    "one_side",
    "place_of",
    "stacked",
]
