from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
import json
import os
from pathlib import Path
import signal
import sqlite3
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import options
from optuna_llm_catalyst.cli.task import DEMO_REPLIES
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import finding
from tests.cli.conftest import Cli


STORAGE = "sqlite:///catalyst.db"
NAME = "prompt-tuning"


def _load(storage: str = STORAGE) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=storage)


def test_report(tune_and_test: Cli) -> None:
    result = tune_and_test()

    study = _load()
    assert result.code == 0
    for trial in study.trials:
        assert trial.user_attrs["prompt"] in result.out
    assert "startup" in result.out
    assert f"Chosen by validation loss: stage {study.best_trial.number}." in result.out
    for name in ("class names alone", "linear probe", "first stage", "chosen stage", "ensemble"):
        assert name in result.out
    assert "the fitted ensemble of 2 stages: export it with `export`" in result.out
    assert f"optuna-dashboard {STORAGE} --artifact-dir llm_catalyst_artifacts" in result.out
    assert "Resuming" not in result.err


def test_json_agrees_with_the_study(tune_and_test: Cli) -> None:
    document = tune_and_test("--json").json

    study = _load()
    assert [stage["loss"] for stage in document["stages"]] == [t.value for t in study.trials]
    assert document["chosen"] == study.best_trial.number
    assert document["first"] == 0
    assert document["test"]["chosen"]["n_examples"] == 18
    assert document["resumed"] is False


@pytest.mark.usefixtures("tuned")
def test_second_run_resumes(tune: Cli) -> None:
    result = tune("--json")

    assert f"Resuming study '{NAME}' with 2 finished stages." in result.err
    assert result.json["resumed"] is True
    assert [stage["number"] for stage in result.json["stages"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("storage", ["sqlite:///parts.db", "parts.log"])
def test_two_runs_equal_one(tune: Cli, storage: str) -> None:
    first = ("--n-startup-trials", 2)
    tune("--stages", 4, "--storage", "sqlite:///whole.db", *first)
    tune("--stages", 3, "--storage", storage, *first)
    tune("--stages", 1, "--storage", storage, *first)

    whole = _load("sqlite:///whole.db").trials
    parts = tune("--stages", 0, "--storage", storage, "--json").json["stages"]
    assert [(t.user_attrs["prompt"], t.user_attrs["origin"], t.value) for t in whole] == [
        (stage["prompt"], stage["origin"], stage["loss"]) for stage in parts
    ]
    assert {t.user_attrs["origin"] for t in whole} == {"startup", "mutation"}


def test_without_ollama_one_line_says_so(tune: Cli) -> None:
    lines = [
        line for line in tune().err.splitlines() if "mutation" in line and "stage" not in line
    ]

    assert len(lines) == 1
    assert "no Ollama server answers at http://127.0.0.1:9" in lines[0]
    assert "ollama pull gemma3:4b" in lines[0]


def test_startup_prompts_are_the_first_stages(tune: Cli) -> None:
    stages = tune(
        *("--startup-prompt", "food tool animal", "--startup-prompt", "wild food"),
        *("--n-startup-trials", 1, "--json"),
    ).json["stages"]

    assert [stage["prompt"] for stage in stages] == ["food tool animal", "wild food"]


@pytest.mark.parametrize("option", [(), ("--startup", "random")])
def test_without_a_template_stages_start_from_random_words(tune: Cli, option: Any) -> None:
    """The tiny model's vocabulary can express none."""
    stages = tune(*option, "--json").json["stages"]
    assert [stage["origin"] for stage in stages] == ["startup"] * 2


@pytest.mark.parametrize(
    ("screen", "is_scored"), [("own", True), ("ensemble", True), ("none", False)]
)
def test_candidates_are_screened_as_asked(tune: Cli, screen: str, is_scored: bool) -> None:
    tune("--n-startup-trials", 1, "--screen", screen)
    for trial in _load().trials[1:]:
        record = records.load(trial, "proposal", dict[str, Any]) or {}
        scores = [row["score"] for row in record["candidates"]]
        assert len(scores) > 1 and all((score is not None) is is_scored for score in scores)


def test_refining_the_best(tune: Cli) -> None:
    document = tune("--refine-steps", 6, "--json").json

    *stages, refined = document["stages"]
    assert refined["origin"] == "refine"
    assert refined["loss_before"] == min(stage["loss"] for stage in stages)
    assert refined["loss"] <= refined["loss_before"]


def test_sequence_classifier(tune_and_test: Cli) -> None:
    document = tune_and_test("--model-type", "sequence-classifier", "--json").json

    assert document["test"]["chosen"]["accuracy"] is not None


def test_shots_draw_train_and_validation(tune: Cli) -> None:
    assert tune("--shots", 4, "--json").code == 0


FAULTS = {
    "no such folder": (["tune", "nowhere"], "nowhere: no such folder"),
    "bad JSON": (["tune", "{data_bad_json}"], "train.jsonl:2: not a line of JSON"),
    "unknown label": (["tune", "{data_bad_label}"], "train.jsonl:2: unknown label 'plant'"),
    "label not in train": (["tune", "{data_no_label}"], "no example of label"),
    "too many shots": (["tune", "{data}", "--shots", "16"], "use at most 4 shots"),
    "model not found": (["tune", "{data}", "--model", "no/such-model"], "model 'no/such-model'"),
    "no model name": (["tune", "{data}", "--model", "a//b"], "model 'a//b'"),
    "startup": (
        ["tune", "{data}", "--startup", "words"],
        "'words' is not one of",
    ),
    "screen": (
        ["tune", "{data}", "--screen", "all"],
        "'all' is not one of",
    ),
    "learning rate": (
        ["tune", "{data}", "--model", "{model}", "--lr", "-1"],
        "'--lr': Input",
    ),
    "stages": (
        ["tune", "{data}", "--stages", "-1"],
        "'--stages': Input should be",
    ),
    "virtual tokens": (
        ["tune", "{data}", "--model", "{model}", "--num-virtual-tokens", "0"],
        "'--num-virtual-tokens': Input should be",
    ),
    "unknown LLM": (["tune", "{data}", "--llm", "gpt"], "--llm 'gpt' is none of auto"),
    "Ollama by name, not there": (
        ["tune", "{data}", "--llm", "ollama:gemma3:4b"],
        "no Ollama server answers at http://127.0.0.1:9",
    ),
    "no replies": (["tune", "{data}", "--llm", "replay:none.jsonl"], "none.jsonl"),
    "storage": (
        ["tune", "{data}", "--model", "{model}", "--storage", "catalyst"],
        "storage 'catalyst' is neither a URL",
    ),
    "storage folder": (
        ["tune", "{data}", "--model", "{model}", "--storage", "sqlite:///no/such/folder/a.db"],
        "unable to open database file",
    ),
    "device": (
        ["tune", "{data}", "--model", "{model}", "--device", "abacus"],
        "--device 'abacus' cannot be used",
    ),
    "seed": (
        ["tune", "{data}", "--seed", "-1"],
        "'--seed': Input should be",
    ),
    "a position for a dual encoder": (
        ["tune", "{data}", "--model", "{model}", "--prompt-position", "front"],
        "--prompt-position needs --model-type sequence-classifier",
    ),
    "too many virtual tokens": (
        ["tune", "{data}", "--model", "{model}", "--num-virtual-tokens", "40"],
        "`space` has 40 virtual tokens, `model` has room for",
    ),
    "artifacts are a file": (
        ["tune", "{data}", "--model", "{model}", "--artifacts", "{file}"],
        "no folder for artifacts",
    ),
    "no journal": (
        ["tune", "{data}", "--model", "{model}", "--storage", "{file}"],
        "this file is not a journal of Optuna",
    ),
    "nothing to refine": (
        [
            *("tune", "{data}", "--model", "{model}", "--num-virtual-tokens", "3"),
            *("--stages", "0", "--refine-steps", "2"),
        ],
        "has no complete stage yet",
    ),
    "show without storage": (["show"], "there is no file catalyst.db"),
    "export without storage": (["export", "out"], "there is no file catalyst.db"),
}


@pytest.fixture
def places(tmp_path: Path, data: Path, tiny_model: Path) -> dict[str, Path]:
    """Folders that the table of faults names, each broken in its own way."""
    rows = (data / "train.jsonl").read_text().splitlines()
    card = (data / "card.json").read_text()
    broken = {
        "data_bad_json": [rows[0], '{"text": '],
        "data_bad_label": [rows[0], '{"text": "fern", "label": "plant"}'],
        "data_no_label": [row for row in rows if json.loads(row)["label"] != 2],
    }
    for name, lines in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text(card)
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "file.log").write_text("not a journal\n")
    here = {"data": data, "model": tiny_model, "file": tmp_path / "file.log"}
    return here | {name: tmp_path / name for name in broken}


@pytest.mark.parametrize(("args", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_mistake_is_one_line(
    cli: Cli, places: dict[str, Path], args: list[str], message: str
) -> None:
    result = cli(*(arg.format(**places) for arg in args))

    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.err
    assert result.out == ""


RESUMED_WITH = {
    "another length": (["--num-virtual-tokens", 4], "3 virtual tokens, this space 4"),
    "other shots": (["--shots", 4], "--shots 0, this command has 4"),
    "another type": (["--model-type", "sequence-classifier"], "--model-type"),
}


@pytest.mark.parametrize(("args", "message"), RESUMED_WITH.values(), ids=RESUMED_WITH.keys())
@pytest.mark.usefixtures("tuned")
def test_incomparable_resume_is_refused(tune: Cli, args: list[object], message: str) -> None:
    result = tune(*args)

    assert result.code == 2
    assert message in result.err
    assert len(_load().trials) == 2


def test_another_prompt_position_is_refused(tune: Cli) -> None:
    classifier = ("--model-type", "sequence-classifier")
    tune(*classifier, "--prompt-position", "front", "--stages", 0)
    result = tune(*classifier)

    assert result.code == 2
    assert "--prompt-position 'front', this command has 'behind_cls'" in result.err


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_other_directions_are_refused(tune: Cli, directions: list[str]) -> None:
    optuna.create_study(storage=STORAGE, study_name=NAME, directions=directions)
    result = tune()

    assert result.code == 2
    assert "does not minimize one value" in result.err


@pytest.mark.usefixtures("tuned")
def test_nan_is_null_in_json(tune: Cli) -> None:
    result = tune("--stages", 1, "--lr", 1e30, "--json")

    # A stage keeps the best it saw: only a start that is no number fails.
    assert result.code == 0
    assert "NaN" not in result.out


@pytest.mark.usefixtures("tuned")
def test_escape_sequences_are_not_printed(cli: Cli) -> None:
    study = _load()
    trial = study.ask()
    trial.set_user_attr("prompt", "\x1b[31mred")
    trial.set_user_attr("origin", "enqueued")
    study.tell(trial, 0.5)
    for command in (["show"], ["show", "--trial", trial.number]):
        assert "\x1b" not in cli(*command).out


@pytest.mark.usefixtures("tuned")
def test_other_tokenizer_is_refused(cli: Cli, data: Path) -> None:
    result = cli("tune", data, "--num-virtual-tokens", 3, "--steps", 1)

    assert result.code == 2
    assert "vocabulary of" in result.err and "this tokenizer has 30522" in result.err


@contextmanager
def _second_stage(data: Path, model: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own in the middle of its second stage."""
    with subprocess.Popen(
        [
            *(sys.executable, "-c", "from optuna_llm_catalyst.cli import main; main()"),
            *("tune", str(data), "--model", str(model), "--num-virtual-tokens", "3"),
            # The first stage trains a text prompt, in few steps.
            *("--stages", "3", "--text-steps", "4", "--steps", "400", "--eval-every", "2"),
            *("--storage", STORAGE),
        ],
        cwd=folder,
        env={**os.environ, "OLLAMA_HOST": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not _is_in_second_stage(folder / "catalyst.db"):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def _is_in_second_stage(database: Path) -> bool:
    # Read past Optuna, which would try to create the tables that the process is creating.
    if not database.exists():
        return False
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            rows = connection.execute(
                "SELECT 1 FROM trial_intermediate_values JOIN trials USING (trial_id) "
                "WHERE number = 1"
            )
            return rows.fetchone() is not None
        except sqlite3.OperationalError:
            return False


def test_killed_process_loses_one_stage(
    tune: Cli, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with _second_stage(data, tiny_model, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    assert [t.state for t in _load().trials] == [TrialState.COMPLETE, TrialState.RUNNING]

    result = tune("--stages", 1)

    assert result.code == 0
    assert "Stage 1 was cut off when its process died: marked as failed." in result.err
    trials = _load().trials
    states = [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert [t.state for t in trials] == states
    assert load_trajectory(trials[0]) is not None and load_trajectory(trials[2]) is not None


def test_interrupt_loses_one_stage(data: Path, tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    with _second_stage(data, tiny_model, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Interrupted" in err and "Traceback" not in err
    assert [t.state for t in _load().trials] == [TrialState.COMPLETE, TrialState.FAIL]


def test_defaults_are_the_librarys() -> None:
    assert options.DEFAULT_MODEL == finding.DEFAULT_MODEL
    assert options.DEFAULT_ARTIFACTS == checkpoints.DEFAULT_FOLDER


def test_the_demo_runs_on_the_real_model(cli: Cli) -> None:
    """Without Ollama its first start is a recorded reply, and the screen says so."""
    options = ("--shots", 8, "--steps", 10, "--text-prompts", 0)
    result = cli("tune", "demo", "--stages", 1, *options, "--json")

    [stage] = result.json["stages"]
    first = json.loads(DEMO_REPLIES.read_text().splitlines()[0])
    assert stage["origin"] == "llm"
    assert stage["prompt"].casefold() in first["reply"].casefold()
    assert "recorded for this demo, as no Ollama server answers at" in result.err
    assert "all-MiniLM-L6-v2" in result.err
    assert stage["loss"] < stage["loss_before"]
    assert result.json["product"] == "fitted ensemble"
    # Six intents: a third of the messages is twice what guessing finds.
    assert result.json["test"]["chosen"]["accuracy"] > 1 / 3


def test_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\nfrom optuna_llm_catalyst.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.returncode == 2
    assert "pip install 'optuna-llm-catalyst[tuning]'" in result.stderr
    assert "Traceback" not in result.stderr
