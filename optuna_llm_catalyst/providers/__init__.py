"""One completion of one LLM: one provider a file, behind one method."""

from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import Provider
from optuna_llm_catalyst.providers.ollama import OllamaProvider
from optuna_llm_catalyst.providers.openai_compatible import OpenAICompatibleProvider
from optuna_llm_catalyst.providers.replay import ReplayProvider
from optuna_llm_catalyst.providers.transformers import TransformersProvider


__all__ = [
    "Completion",
    "CompletionRequest",
    "OllamaProvider",
    "OpenAICompatibleProvider",
    "Provider",
    "ReplayProvider",
    "TransformersProvider",
]
