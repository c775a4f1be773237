from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
import json
from pathlib import Path
import shutil
import sys
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst.cli.app import run
from optuna_llm_catalyst.prompt_tuning import baselines
from optuna_llm_catalyst.prompt_tuning import fitted
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_readout
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
    """A folder of a task, as `tune` takes it: what is measured on a test split costs the most."""
    return _save_task(tmp_path_factory.mktemp("data"), "train", "validation")


@pytest.fixture(scope="session")
def tested_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a test split."""
    return _save_task(tmp_path_factory.mktemp("data"), "train", "validation", "test")


def _save_task(folder: Path, *splits: str) -> Path:
    task = make_task()
    for split in splits:
        rows = [json.dumps(asdict(example)) for example in getattr(task, split)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    card = {"task": "topics", "labels": LABELS, "description": "Sort texts by topic."}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command of the real command line, in an empty folder and without Ollama."""
    _be_in(tmp_path, monkeypatch)

    def call(*args: object) -> Result:
        capfd.readouterr()
        code = _run(monkeypatch, *args)
        return Result(code, *capfd.readouterr())

    return call


def _be_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "160")
    # 22 fits a readout would take most of a short command's time. They have tests of their own.
    few = partial(fit_readout, scales=(20.0,), pulls=(1.0, 10.0))
    for module in (baselines, fitted):
        monkeypatch.setattr(module, "fit_readout", few)


def _run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["optuna-llm-catalyst", *map(str, args)])
    verbosity = optuna.logging.get_verbosity()
    try:
        return run()
    finally:
        optuna.logging.set_verbosity(verbosity)


#: Few and short stages.
SHORT = ("--stages", 2, "--steps", 4, "--eval-every", 2, "--num-virtual-tokens", 3)


@pytest.fixture
def tune(cli: Cli, data: Path, tiny_model: Path) -> Cli:
    """`tune` with few and short stages of a tiny model; options given win."""
    return lambda *args: cli("tune", data, "--model", tiny_model, *SHORT, *args)


@pytest.fixture
def tune_and_test(cli: Cli, tested_data: Path, tiny_model: Path) -> Cli:
    """The same with a test split."""
    return lambda *args: cli("tune", tested_data, "--model", tiny_model, *SHORT, *args)


@pytest.fixture
def tuned(cli: Cli, tuned_folder: Path) -> None:
    """A study is there already, as `tune` without options leaves it."""
    del cli  # Goes to the empty folder.
    shutil.copytree(tuned_folder, Path.cwd(), dirs_exist_ok=True)


@pytest.fixture(scope="session")
def tuned_folder(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    tune_in(folder, data, tiny_model)
    return folder


def tune_in(folder: Path, data: Path, tiny_model: Path, *args: object) -> None:
    """Leaves in a folder what `tune` leaves, for tests to copy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _be_in(folder, monkeypatch)
        assert _run(monkeypatch, "tune", data, "--model", tiny_model, *SHORT, *args) == 0
