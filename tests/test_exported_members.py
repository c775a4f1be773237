from __future__ import annotations

import ast
from collections.abc import Container
from collections.abc import Iterator
from dataclasses import dataclass
import graphlib
import importlib
from pathlib import Path
import subprocess
import sys
from typing import Any
from typing import NamedTuple

import pytest

import optuna_llm_catalyst


PACKAGE = "optuna_llm_catalyst"
ROOT = Path(optuna_llm_catalyst.__file__).parent

PUBLIC = {
    PACKAGE: [
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
    ],
    f"{PACKAGE}.prompt_tuning": [
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
        "of_predictions",
        "over_http",
        "task_from_table",
        "task_from_texts",
        "word_table",
        "write_peft",
    ],
}
HEAVY = {"httpx", "ollama", "openai", "pydantic", "torch", "transformers"}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_surface_changes_only_on_purpose(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == PUBLIC[module]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names]
)
def test_every_public_name_is_documented(module: str, name: str) -> None:
    assert is_documented(getattr(importlib.import_module(module), name))


def is_documented(thing: Any) -> bool:
    """Whether somebody wrote a docstring; Python makes one for dataclasses and named tuples."""
    return bool(thing.__doc__) and not thing.__doc__.startswith(f"{thing.__name__}(")


def test_a_generated_docstring_documents_nothing() -> None:
    @dataclass
    class Bare:
        size: int

    class BareTuple(NamedTuple):
        size: int

    def bare() -> None:
        pass

    assert not any(is_documented(thing) for thing in (Bare, BareTuple, bare))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys; from {PACKAGE} import *; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())
    assert f"{PACKAGE}.sampler" in loaded
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()


def test_the_torch_free_half_does_not_import_torch() -> None:
    # The last runs an LLM in this process, and is imported when it does.
    torch_half = tuple(
        f"{PACKAGE}.{name}" for name in ("prompt_tuning", "cli", "providers.transformers")
    )
    for module, imported in _imports().items():
        if not module.startswith(torch_half):
            assert not {name for name in imported if name.partition(".")[0] == "torch"}, module


def test_prompt_tuning_knows_nothing_of_whoever_chooses_restarts() -> None:
    others = tuple(f"{PACKAGE}.{name}" for name in ("sampler", "proposers", "providers"))
    for module, imported in _imports().items():
        if module.startswith(f"{PACKAGE}.prompt_tuning"):
            # The package itself exports the sampler: its names come from their own modules.
            assert PACKAGE not in imported, module
            assert not {name for name in imported if name.startswith(others)}, module


def test_imports_run_in_no_circle() -> None:
    graph = {
        module: {name for name in imported if name.startswith(PACKAGE)}
        for module, imported in _imports().items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index(f"{PACKAGE}.history") < order.index(f"{PACKAGE}.sampler")


def _imports() -> dict[str, set[str]]:
    """Every module of the package with the modules that it names in imports, anywhere in it."""
    paths = {_module_name(path): path for path in ROOT.rglob("*.py")}
    return {
        module: {
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in _imported_by(node, paths.keys())
        }
        for module, path in paths.items()
    }


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_by(node: ast.AST, modules: Container[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "the house imports absolutely"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in modules else node.module
