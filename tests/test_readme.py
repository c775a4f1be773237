from __future__ import annotations

from pathlib import Path
import re
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst.prompt_tuning import GradientStage


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_example_of_ask_and_tell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), names)

    tried = [(t.user_attrs["origin"], t.user_attrs["prompt"]) for t in names["study"].trials]
    assert tried[:2] == [
        ("enqueued", "sort question kind"),
        ("startup", "find which topic"),
    ]
    assert len(capsys.readouterr().out.split()) == 3


def test_the_examples_of_the_objective_and_of_its_classifier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Fewer and shorter stages than a reader wants; everything else as printed.
    short = "stage=GradientStage(n_steps=2), text_stage=GradientStage(n_steps=1, batch_size=16)"
    code = BLOCKS[1]
    for printed, shorter in (
        (
            "PromptTuningObjective(model, task, space)",
            f"PromptTuningObjective(model, task, space, {short})",
        ),
        ("n_trials=8", "n_trials=2"),
    ):
        assert printed in code
        code = code.replace(printed, shorter)
    exec(compile(code, "README.md", "exec"), {"GradientStage": GradientStage})
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)

    study = optuna.load_study(study_name="intents", storage="sqlite:///catalyst.db")
    assert [trial.user_attrs["origin"] for trial in study.trials] == ["template"] * 2
    assert capsys.readouterr().out.strip().endswith("%")
    assert names["classifier"].predict(["Where is my parcel?"])[0] in names["classifier"].classes_
