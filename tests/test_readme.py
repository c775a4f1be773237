from __future__ import annotations

from pathlib import Path
import re
from typing import Any

import optuna
import pytest


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_example_of_ask_and_tell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)

    tried = [(t.user_attrs["origin"], t.user_attrs["prompt"]) for t in names["study"].trials]
    assert tried[:2] == [
        ("enqueued", "sort question kind"),
        ("startup", "find which topic"),
    ]
    assert len(capsys.readouterr().out.split()) == 3


def test_the_example_of_the_objective_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    demo = ROOT / "optuna_llm_catalyst" / "demo" / "customer_support"
    # Fewer and shorter stages than a reader wants; everything else as printed.
    code = BLOCKS[0].replace("path/to/task", str(demo))
    for long, short in (("n_steps=60", "n_steps=2"), ("n_steps=300", "n_steps=2")):
        assert long in code
        code = code.replace(long, short)
    code = code.replace("n_trials=10", "n_trials=4")
    exec(compile(code, "README.md", "exec"), {})

    study = optuna.load_study(study_name="trec", storage="sqlite:///catalyst.db")
    assert [trial.user_attrs["origin"] for trial in study.trials] == [
        *["template"] * 4,
        "refine",
    ]
    assert "accuracy=" in capsys.readouterr().out
