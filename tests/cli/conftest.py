from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
import json
from pathlib import Path
import sys
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst.cli.app import run
from tests.prompt_tuning.tiny import LABELS
from tests.prompt_tuning.tiny import make_encoder
from tests.prompt_tuning.tiny import make_task


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random encoder, as `--model` takes it."""
    folder = tmp_path_factory.mktemp("model")
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a task, as `tune` takes it."""
    folder = tmp_path_factory.mktemp("data")
    task = make_task()
    for split in ("train", "validation", "test"):
        rows = [json.dumps(asdict(example)) for example in getattr(task, split)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    card = {"task": "topics", "labels": LABELS, "description": "Sort texts by topic."}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command of the real command line, in an empty folder and without Ollama."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "160")

    def call(*args: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["optuna-llm-catalyst", *map(str, args)])
        verbosity = optuna.logging.get_verbosity()
        try:
            code = run()
        finally:
            optuna.logging.set_verbosity(verbosity)
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def tune(cli: Cli, data: Path, tiny_model: Path) -> Cli:
    """`tune` with few and short stages of a tiny model; options given win."""

    def call(*args: object) -> Result:
        short = ("--stages", 2, "--steps", 4, "--eval-every", 2, "--num-virtual-tokens", 3)
        return cli("tune", data, "--model", tiny_model, *short, *args)

    return call
