"""Gradient descent tunes a prompt, an LLM decides where it starts again: inside Optuna.

Importing this package loads its modules only as their names are used; what needs torch is in
:mod:`optuna_llm_catalyst.prompt_tuning`.
"""

from importlib import import_module
from typing import Any
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_llm_catalyst.exceptions import CatalystError
    from optuna_llm_catalyst.exceptions import CheckpointError
    from optuna_llm_catalyst.exceptions import DataError
    from optuna_llm_catalyst.exceptions import InvalidReplyError
    from optuna_llm_catalyst.exceptions import ModelError
    from optuna_llm_catalyst.exceptions import ModelNotFoundError
    from optuna_llm_catalyst.exceptions import ProviderError
    from optuna_llm_catalyst.exceptions import StudyMismatchError
    from optuna_llm_catalyst.mistakes import Confusion
    from optuna_llm_catalyst.mistakes import EnsembleRecord
    from optuna_llm_catalyst.mistakes import MisreadText
    from optuna_llm_catalyst.mistakes import Mistakes
    from optuna_llm_catalyst.prompt_space import PromptSpace
    from optuna_llm_catalyst.prompt_space import RestartPrompt
    from optuna_llm_catalyst.proposers import LLMProposer
    from optuna_llm_catalyst.proposers import MutationProposer
    from optuna_llm_catalyst.providers import OllamaProvider
    from optuna_llm_catalyst.providers import OpenAICompatibleProvider
    from optuna_llm_catalyst.providers import ReplayProvider
    from optuna_llm_catalyst.providers import TransformersProvider
    from optuna_llm_catalyst.records import load_ensemble
    from optuna_llm_catalyst.records import load_mistakes
    from optuna_llm_catalyst.records import load_trajectory
    from optuna_llm_catalyst.records import record_ensemble
    from optuna_llm_catalyst.records import record_mistakes
    from optuna_llm_catalyst.records import record_trajectory
    from optuna_llm_catalyst.sampler import LLMCatalystSampler
    from optuna_llm_catalyst.trajectory import DriftWord
    from optuna_llm_catalyst.trajectory import Swap
    from optuna_llm_catalyst.trajectory import Trajectory
    from optuna_llm_catalyst.trajectory import TrajectoryPoint


__all__ = [
    "CatalystError",
    "CheckpointError",
    "Confusion",
    "DataError",
    "DriftWord",
    "EnsembleRecord",
    "InvalidReplyError",
    "LLMCatalystSampler",
    "LLMProposer",
    "MisreadText",
    "Mistakes",
    "ModelError",
    "ModelNotFoundError",
    "MutationProposer",
    "OllamaProvider",
    "OpenAICompatibleProvider",
    "PromptSpace",
    "ProviderError",
    "ReplayProvider",
    "RestartPrompt",
    "StudyMismatchError",
    "Swap",
    "Trajectory",
    "TrajectoryPoint",
    "TransformersProvider",
    "load_ensemble",
    "load_mistakes",
    "load_trajectory",
    "record_ensemble",
    "record_mistakes",
    "record_trajectory",
]

_MODULES = (
    "exceptions",
    "mistakes",
    "prompt_space",
    "proposers",
    "providers",
    "records",
    "sampler",
    "trajectory",
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Loads a name when it is first used, so that the command line starts at once."""
        if name in __all__:
            for module in _MODULES:
                found = getattr(import_module(f"{__name__}.{module}"), name, None)
                if found is not None:
                    return globals().setdefault(name, found)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
