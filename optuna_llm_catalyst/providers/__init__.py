"""One completion of one LLM: one provider a file, behind one method."""

from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import Provider
from optuna_llm_catalyst.providers.ollama import OllamaProvider
from optuna_llm_catalyst.providers.replay import ReplayProvider


__all__ = [
    "Completion",
    "CompletionRequest",
    "OllamaProvider",
    "Provider",
    "ReplayProvider",
]
