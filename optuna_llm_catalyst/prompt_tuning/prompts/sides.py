"""A prompt of two sides, taken apart and put together."""

from __future__ import annotations

from optuna_llm_catalyst.prompt_tuning.prompts.base import is_gate
from optuna_llm_catalyst.prompt_tuning.prompts.base import is_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import place_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts.base import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts.deep import DeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.deep import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import sized
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt


def one_side(prompt: Prompt, side: Side) -> Prompt:
    """What stands before the inputs of one side, with the head if any."""
    kept = {n: t for n, t in prompt.tensors.items() if is_of(n, side) or is_of(n, "head")}
    return Prompt(_kind_of(kept), kept)


def both_sides(labels: Prompt, texts: Prompt) -> Prompt:
    """Two prompts of one side each as one."""
    tensors = {**texts.tensors, **labels.tensors}
    return Prompt(on_both_sides(_kind_of(tensors)), tensors)


def on_both_sides(kind: PromptKind) -> PromptKind:
    """The kind of two sides that goes with one of one side."""
    if isinstance(kind, LowRankPrompt):
        return TwoSidedLowRankPrompt(kind.rank, kind.hidden)
    return TwoSidedDeepPrompt() if isinstance(kind, DeepPrompt) else TwoSidedPrompt()


def _kind_of(tensors: Tensors) -> PromptKind:
    """The kind of one side with tensors of these names."""
    names = [name for name in tensors if not is_of(name, "head")]
    if any(map(is_gate, names)):
        return sized(LowRankPrompt(), tensors)
    return DeepPrompt() if any(place_of(name)[1] > 0 for name in names) else SoftPrompt()
