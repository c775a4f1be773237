"""The page about data: its Python runs as pasted, its screen is what a command prints."""

from __future__ import annotations

import json
from pathlib import Path
import re

import pytest

from optuna_llm_catalyst.cli.task import load_task
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning import load_task as load


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_prints_what_it_says(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "data.md", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said != []


def test_the_screen_is_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"review {i},{i % 3 + 1}" for i in range(60)]
    lines = ["review,stars", *rows, ",1", "review 0,1", "review 0,2"]
    Path("reviews.csv").write_text("\n".join(lines))
    _, said = load_task(TuneOptions(data="reviews.csv", text="review", label="stars"))
    assert "\n".join(said) in PAGE


def test_the_folder_is_a_task(tmp_path: Path) -> None:
    card = re.findall(r"card\.json +(\{.*\})", PAGE)[0]
    (tmp_path / "card.json").write_text(card)
    (tmp_path / "train.csv").write_text("text,label\na,bad\nb,good\nc,0\nd,1\n")
    task = load(tmp_path)
    assert (task.name, task.description) == ("weather", json.loads(card)["description"])
