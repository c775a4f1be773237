from __future__ import annotations

import json
from pathlib import Path
import shutil

import optuna
import pytest
from safetensors.torch import load_file

from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
from optuna_llm_catalyst.prompt_tuning.checkpoints import read
from tests.cli.conftest import Cli
from tests.cli.conftest import tune_in


@pytest.fixture(scope="module")
def made(tested_data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `tune` was run, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    tune_in(folder, tested_data, tiny_model, "--stages", 4, "--n-startup-trials", 3)
    return folder


@pytest.fixture
def study(cli: Cli, made: Path) -> optuna.Study:
    del cli  # Goes to an empty folder.
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")


def test_show_lists_every_stage(cli: Cli, study: optuna.Study) -> None:
    table, document = cli("show"), cli("show", "--json").json

    assert all(trial.user_attrs["prompt"] in table.out for trial in study.trials)
    assert document["chosen"] == study.best_trial.number
    assert [stage["loss"] for stage in document["stages"]] == [t.value for t in study.trials]


def test_show_tells_the_story_of_one_stage(cli: Cli, study: optuna.Study) -> None:
    story, document = cli("show", "--trial", 3), cli("show", "--trial", 3, "--json").json

    assert "Stage 3 (complete), origin mutation" in story.out
    assert len(document["proposal"]["candidates"]) == 4
    for candidate in document["proposal"]["candidates"]:
        assert f"{candidate['text']} (loss {candidate['score']:.3f} without training)" in story.out
    assert [point["step"] for point in document["trajectory"]["points"]] == [0, 2, 4]


@pytest.mark.parametrize("number", [0, 3])
def test_export_writes_the_trained_prompt(
    cli: Cli, study: optuna.Study, tmp_path: Path, number: int
) -> None:
    result = cli("export", "out", "--trial", number)

    store = folder_store(tmp_path / "llm_catalyst_artifacts")
    expected = load_soft_prompt(study, trial_number=number, artifact_store=store)
    exported = read(tmp_path / "out" / "soft_prompt.safetensors")
    card = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert result.code == 0
    assert exported.prompt.words().equal(expected.prompt.words())
    assert card["text"] == study.trials[number].user_attrs["prompt"]
    assert card["fingerprint"] == expected.facts.fingerprint
    assert card["stage"]["loss"] == study.trials[number].value


def test_export_writes_the_classifier(cli: Cli, study: optuna.Study) -> None:
    result = cli("export", "a folder")

    found = load_classifier("a folder")
    assert result.code == 0 and result.err == ""
    assert found.ensemble.numbers == (0, 1, 2, 3)
    assert "Classifier of 4 stages (fitted) exported to a folder/" in result.out
    card = Path("a folder/README.md").read_text()
    assert "| fitted ensemble |" in card and "| linear probe |" in card
    assert "predict 'a folder' --text" in result.out


@pytest.mark.parametrize("position", ["behind_cls", "front"])
def test_export_of_a_peft_adapter(
    cli: Cli, tune: Cli, tmp_path: Path, tiny_model: Path, position: str
) -> None:
    tune("--model-type", "sequence-classifier", "--prompt-position", position)
    result = cli("export", "--peft", "adapter", "--json")

    if position == "behind_cls":
        assert result.code == 2 and len(result.err.splitlines()) == 1
        assert "PEFT cannot give" in result.err and "--prompt-position front" in result.err
        assert not (tmp_path / "adapter").exists()
        return
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    store = folder_store(tmp_path / "llm_catalyst_artifacts")
    prompt = load_soft_prompt(study, artifact_store=store).prompt
    written = load_file("adapter/adapter_model.safetensors")
    assert result.json["stage"] == study.best_trial.number
    assert sorted(result.json["peft"]) == sorted(map(str, Path("adapter").iterdir()))
    assert written["prompt_embeddings"].equal(prompt.words()[0])
    assert f"BASE = {str(tiny_model)!r}" in Path("adapter/README.md").read_text()
    # Texts are cut where the prompt of 3 leaves no more of the 40 positions.
    assert "max_length=37," in Path("adapter/README.md").read_text()


FAULTS = {
    "another study": (["show", "--study-name", "x"], "no study 'x'; it has: 'prompt-tuning'"),
    "another stage": (["show", "--trial", "9"], "has no stage 9"),
    "export another stage": (["export", "out", "--trial", "9"], "has no stage 9"),
    "artifacts": (["export", "out", "--artifacts", "none"], "--artifacts 'none': no such folder"),
    "wrong artifacts": (["export", "out", "--artifacts", "."], "not in this artifact store"),
    "wrong artifacts of a stage": (
        ["export", "out", "--trial", "0", "--artifacts", "."],
        "not in this artifact store",
    ),
    "output is a file": (["export", "catalyst.db"], "cannot be written"),
    "no prompt for PEFT": (
        ["export", "--peft", "out"],
        "tune with --model-type sequence-classifier --prompt-position front",
    ),
    "PEFT without artifacts": (["export", "--peft", "out", "--artifacts", "none"], "no such fold"),
    "nothing to export": (["export"], "say what to export"),
}


@pytest.mark.parametrize(("args", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_mistake_is_one_line(cli: Cli, study: optuna.Study, args: list[str], message: str) -> None:
    del study
    result = cli(*args)

    assert result.code == 2
    assert result.err.startswith("error: ") and len(result.err.splitlines()) == 1
    assert message in result.err


def test_doctor_without_llm(cli: Cli, tiny_model: Path) -> None:
    result = cli("doctor", "--model", tiny_model, "--json")

    findings = {finding["what"]: finding for finding in result.json}
    assert result.code == 0
    assert all(finding["ok"] for finding in result.json if finding["needed"])
    assert findings["optuna"]["detail"] == optuna.__version__
    assert not findings["LLM auto"]["ok"] and not findings["LLM auto"]["needed"]


def test_doctor_fails_without_what_was_named(cli: Cli, tiny_model: Path) -> None:
    without_model = cli("doctor", "--model", "no/such-model")
    without_llm = cli("doctor", "--model", tiny_model, "--llm", "ollama:gemma3:4b")

    assert without_model.code == 1 and "FAILED" in without_model.out
    assert without_llm.code == 1 and "no Ollama server answers" in without_llm.out
