"""The notebook and the pages under docs: their Python runs as it stands there."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import re
from typing import Any

from huggingface_hub import constants
import numpy as np
import optuna
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import records
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store

from .markdown_tables import table
from .ollama_server import OllamaServer
from .prompt_tuning.tiny import make_objective
from .prompt_tuning.tiny import tiny_stage


ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
#: As the notebook's parameters, for a test: what papermill would put behind their cell.
FEW = {"shots": 4, "n_trials": 2, "n_steps": 2, "n_text_steps": 1}


def blocks_by_page() -> dict[str, list[str]]:
    """The Python of each page that has any. The page about data has a test of its own."""
    pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "data.md"]
    found = {
        page.name: re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        for page in pages
    }
    return {name: blocks for name, blocks in found.items() if blocks}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, no hub, and Optuna's log as it was."""
    verbosity = optuna.logging.get_verbosity()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    optuna.logging.set_verbosity(verbosity)


def run_notebook() -> dict[str, Any]:
    """The names after all code cells, with few and short stages."""
    names: dict[str, Any] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert FEW.keys() <= names.keys()
                names.update(FEW)
    return names


def test_the_notebook_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with OllamaServer(['{"prompts": ["this customer writes about the"]}']) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        names = run_notebook()

    origins = [trial.user_attrs["origin"] for trial in names["study"].trials]
    assert origins == ["template", "template", "llm"]
    assert isinstance(names["study"].pruner, optuna.pruners.NopPruner)
    task, classifier, loaded = (names[name] for name in ("task", "classifier", "loaded"))
    assert names["rows"][-1].name == "fitted ensemble"
    assert (names["predicted"] == names["names"]).mean() > 0.5  # A guess: one in six.
    assert set(names["labels"]) <= set(task.labels)
    assert loaded.classes_.tolist() == list(task.labels)
    messages = [*names["messages"], *names["texts"][:5]]
    np.testing.assert_array_equal(loaded.predict(messages), classifier.predict(messages))
    np.testing.assert_allclose(
        loaded.predict_proba(messages), classifier.predict_proba(messages), rtol=0, atol=1e-6
    )
    out = capsys.readouterr().out.splitlines()
    assert "Texts: 24 24 216" in out
    assert out[-1] == str(names["labels"])


def test_the_notebook_is_stripped() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.fixture
def study() -> optuna.Study:
    """The study of the pages: a first stage, one of an LLM, and one that refines."""
    objective = make_objective(
        store=folder_store("llm_catalyst_artifacts"),
        n_text_prompts=1,
        text_stage=tiny_stage(batch_size=4),
    )
    storage = "sqlite:///catalyst.db"
    study = optuna.create_study(study_name="trec", storage=storage, direction=objective.direction)
    with OllamaServer(['{"prompts": ["know the food"]}']) as server:
        study.sampler = LLMCatalystSampler(
            objective.space,
            llm=OllamaProvider(host=server.url),
            n_startup_trials=1,
            screen=objective.score,
            seed=0,
        )
        study.optimize(objective, n_trials=2)
    objective.refine(study, n_steps=2)
    return study


def test_a_trial_holds_what_its_page_lists(study: optuna.Study) -> None:
    attributes = {name for trial in study.trials for name in trial.user_attrs}
    assert attributes == set(table("studies.md", "user attribute").names)
    stored = {name for trial in study.trials for name in trial.system_attrs}
    names = {name.split(":")[1] for name in stored if name.startswith(records.PREFIX)}
    assert names == set(table("studies.md", "record").names)
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    assert origins == ["startup", "llm", "refine"]
    assert set(origins) < set(table("studies.md", "origin").names)


@pytest.mark.parametrize("page", blocks_by_page())
def test_the_python_of_a_page_runs(page: str, request: pytest.FixtureRequest) -> None:
    blocks = blocks_by_page()[page]
    if any("load_study" in code for code in blocks):
        request.getfixturevalue("study")
    names: dict[str, Any] = {}
    for i, code in enumerate(blocks):
        exec(compile(code, f"{page}, block {i}", "exec"), names)
