"""A prompt of two sides, taken apart and put together."""

from __future__ import annotations

from optuna_llm_catalyst.prompt_tuning.prompts.base import is_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import place_of
from optuna_llm_catalyst.prompt_tuning.prompts.base import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts.base import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts.base import Side
from optuna_llm_catalyst.prompt_tuning.prompts.base import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts.deep import DeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.deep import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts.soft import TwoSidedPrompt


def one_side(prompt: Prompt, side: Side) -> Prompt:
    """What stands before the inputs of one side, with the head if any."""
    kept = {n: t for n, t in prompt.tensors.items() if is_of(n, side) or is_of(n, "head")}
    return Prompt(DeepPrompt() if _is_deep(kept) else SoftPrompt(), kept)


def both_sides(labels: Prompt, texts: Prompt) -> Prompt:
    """Two prompts of one side each as one."""
    tensors = {**texts.tensors, **labels.tensors}
    return Prompt(TwoSidedDeepPrompt() if _is_deep(tensors) else TwoSidedPrompt(), tensors)


def on_both_sides(kind: PromptKind) -> PromptKind:
    """The kind of two sides that goes with one of one side."""
    return TwoSidedDeepPrompt() if isinstance(kind, DeepPrompt) else TwoSidedPrompt()


def _is_deep(tensors: Tensors) -> bool:
    return any(not is_of(name, "head") and place_of(name)[1] > 0 for name in tensors)
