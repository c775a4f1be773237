"""How `tune` is told what to optimise and how to train, and what is shown of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import get_args
from typing import get_type_hints

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import recipe
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning.metrics import METRICS
from optuna_llm_catalyst.prompt_tuning.objective import TEXT_STAGE
from tests.cli.conftest import Cli
from tests.prompt_tuning.tiny import make_objective
from tests.prompt_tuning.tiny import tiny_stage


STORAGE = "sqlite:///catalyst.db"
NAME = "prompt-tuning"


def _load(name: str = NAME) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=STORAGE)


def _settings(study: optuna.Study) -> list[dict[str, Any]]:
    found = [records.load(trial, "stage", dict[str, Any]) for trial in study.trials]
    return [record["settings"] for record in found if record]


def _words(text: str) -> str:
    """A table's text without its borders."""
    return " ".join(text.replace("│", " ").split())


def test_defaults_are_the_librarys() -> None:
    default = TuneOptions(data="x")
    stage, text_stage = GradientStage(), TEXT_STAGE
    assert get_args(get_type_hints(TuneOptions)["metric"]) == tuple(METRICS)
    assert recipe.stage(default) == stage
    assert recipe.text_stage(default) == text_stage
    assert recipe.make_stage(default) is None
    assert isinstance(recipe.pruner(default), optuna.pruners.NopPruner)


# What is optimised.


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
def test_a_metric_is_optimised_and_shown(tune_and_test: Cli, cli: Cli, metric: str) -> None:
    result = tune_and_test("--stages", 3, "--metric", metric)

    study = _load()
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    shown = "{:.1%}" if metric == "accuracy" else "{:.3f}"
    for trial in study.trials:
        value = shown.format(trial.value)
        assert f"stage {trial.number}: {metric} {value}, startup" in result.err
        assert f"{shown.format(trial.intermediate_values[0])}→{value}" in result.out
    assert f"Stages by {metric} (validation" in result.out
    assert f"Chosen by validation {metric}: stage" in result.out
    assert "18 test examples, which chose nothing." in result.out
    assert ("macro-F1" if metric == "macro-f1" else "accuracy") in result.out

    document = cli("show", "--json").json
    assert (document["metric"], document["direction"]) == (metric, "maximize")
    assert [stage["value"] for stage in document["stages"]] == [t.value for t in study.trials]
    values = [(-t.value, t.user_attrs["loss"]) for t in study.trials]
    assert document["chosen"] == values.index(min(values))
    again = tune_and_test("--stages", 0, "--metric", metric, "--json").json
    assert (again["metric"], again["chosen"]) == (metric, document["chosen"])
    assert {"value", "loss", "accuracy", "n_examples"} == again["test"]["chosen"].keys()


def test_the_story_of_a_stage_is_told_in_its_metric(tune: Cli, cli: Cli) -> None:
    tune("--stages", 4, "--metric", "macro-f1", "--n-startup-trials", 3)
    story, document = cli("show", "--trial", 3), cli("show", "--trial", 3, "--json").json

    assert document["stage"]["metric"] == "macro-f1"
    for candidate in document["proposal"]["candidates"]:
        assert f"(macro-f1 {candidate['score']:.3f} without training)" in story.out
    for step, value in _load().trials[3].intermediate_values.items():
        assert f"step {step}: loss " in story.out
        assert f"best macro-f1 so far {value:.3f}" in story.out
    ensemble = document["ensemble"]
    assert (
        f"Ensemble so far, with this stage: {ensemble['n_members']} members, validation macro-f1 "
        f"{ensemble['value']:.3f}, loss {ensemble['loss']:.3f}, accuracy "
        f"{ensemble['accuracy']:.1%}"
    ) in story.out
    assert "Text prompt: none" in story.out
    assert "Text prompt: trained here" in cli("show", "--trial", 0).out


REFUSED = {
    "another direction": ("loss", "accuracy", "does not maximize one value"),
    "the other way round": ("macro-f1", "loss", "does not minimize one value"),
    "the same direction": ("macro-f1", "accuracy", "was made with --metric 'macro-f1'"),
}


@pytest.mark.parametrize(("made", "resumed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_resuming_with_another_metric_is_refused(
    tune: Cli, made: str, resumed: str, message: str
) -> None:
    tune("--stages", 0, "--metric", made)
    result = tune("--metric", resumed)

    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err
    assert not _load().trials


# How stages are trained.


def test_options_reach_the_stages(tune: Cli) -> None:
    result = tune(
        *("--stages", 3, "--patience", 4, "--schedule", "cosine", "--lr", 0.01),
        *("--text-steps", 6, "--text-lr", 0.02, "--later-texts", "prompted", "--refine-steps", 8),
    )

    assert result.code == 0
    text, *others, refined = _settings(_load())
    assert text.items() >= {"n_steps": 6, "text_lr": 0.02, "patience": 4, "eval_every": 2}.items()
    for settings in others:
        assert settings.items() >= {"n_steps": 4, "lr": 0.01, "schedule": "cosine"}.items()
        assert settings["patience"] == 4
    assert refined["n_steps"] == 8
    told = [trial.user_attrs["text_prompt"] for trial in _load().trials[:3]]
    assert told == ["trained here", "of stage 0", "of stage 0"]


@pytest.mark.parametrize(("n", "told"), [(0, ["none"] * 3), (2, ["trained here"] * 2 + ["none"])])
def test_so_many_text_prompts_are_trained(tune: Cli, n: int, told: list[str]) -> None:
    tune("--stages", 3, "--text-prompts", n)
    assert [trial.user_attrs["text_prompt"] for trial in _load().trials] == told


def test_text_prompts_have_a_column_if_they_differ(tune: Cli, cli: Cli) -> None:
    tune("--stages", 2, "--text-prompts", 0)
    assert "none" not in cli("show").out
    tune("--stages", 2, "--study-name", "mixed")
    shown = cli("show", "--study-name", "mixed").out
    assert "trained" in shown and "none" in shown
    # A stage that trains a text prompt has settings of its own: they are no difference.
    assert "settings" not in shown


def test_settings_are_compared_among_stages_of_a_kind(tune: Cli) -> None:
    """Neither a text prompt's stage nor a refined one is trained as the others are."""
    tune("--stages", 1)
    assert "compare" not in tune("--stages", 1, "--refine-steps", 6).err
    assert "compare" not in tune("--stages", 1).err
    assert "n_steps 4, this command trains with n_steps 6" in tune("--steps", 6).err


# What the study chooses beside the prompt.


@pytest.mark.parametrize("given", [("--search", "lr,schedule"), ("--search", "lr") * 2])
def test_what_is_searched_is_shown(tune: Cli, cli: Cli, given: tuple[str, ...]) -> None:
    tune("--stages", 4, "--text-prompts", 0, *given)

    trials, names = _load().trials, {"lr", "schedule"} if "lr,schedule" in given else {"lr"}
    shown = _words(cli("show").out)
    for trial in trials:
        assert {name for name in trial.params if not name.startswith("prompt[")} == names
        assert 0.001 <= trial.params["lr"] <= 0.025
        assert f"{trial.params['lr']:.3g}" in shown
    assert len({trial.params["lr"] for trial in trials}) == 4
    assert [s["lr"] for s in _settings(_load())] == [trial.params["lr"] for trial in trials]


def test_a_search_goes_on_as_if_uninterrupted(tune: Cli) -> None:
    search = ("--search", "lr", "--text-prompts", 0)
    tune("--stages", 4, *search, "--study-name", "whole")
    for _ in range(2):
        tune("--stages", 2, *search, "--study-name", "parts")

    whole, parts = _load("whole").trials, _load("parts").trials
    assert [(t.params, t.value) for t in whole] == [(t.params, t.value) for t in parts]


def test_an_unknown_name_is_refused(tune: Cli) -> None:
    result = tune("--search", "lr,steps")
    assert result.code == 2
    assert "error: --search 'steps' is none of lr, schedule." in result.err


# When stages end.


@pytest.mark.parametrize("name", ["median", "hyperband"])
def test_stages_that_fall_behind_are_pruned(name: str, tmp_path: Path) -> None:
    """After a third of their steps; and never those that train a text prompt."""
    given = TuneOptions(data="x", steps=6, eval_every=1, pruner=name)  # type: ignore[arg-type]
    objective = make_objective(
        store=FileSystemArtifactStore(str(tmp_path)),
        stage=replace(recipe.stage(given), lr=0.03),
        text_stage=tiny_stage(n_steps=6, eval_every=1, batch_size=8),
        n_text_prompts=2,
    )
    study = optuna.create_study(
        pruner=recipe.pruner(given), sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(objective, n_trials=20)

    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and len(pruned) < 18
    assert all(2 <= trial.user_attrs["stage_steps"] <= 6 for trial in pruned)
    assert [trial.state for trial in study.trials[:2]] == [TrialState.COMPLETE] * 2
    assert name == "hyperband" or all(trial.number >= 5 for trial in pruned)


def test_pruned_stages_are_shown(tune: Cli, cli: Cli) -> None:
    tune("--stages", 7, "--steps", 3, "--eval-every", 1, "--pruner", "hyperband")
    states = [stage["state"] for stage in cli("show", "--json").json["stages"]]
    assert set(states) == {"complete", "pruned"}
    assert "(pruned)" in cli("show").out


@pytest.mark.parametrize("steps", [0, 1, 60])
@pytest.mark.parametrize("name", ["median", "hyperband"])
def test_pruners_fit_any_number_of_steps(name: str, steps: int) -> None:
    study = optuna.create_study(
        pruner=recipe.pruner(TuneOptions(data="x", steps=steps, pruner=name))  # type: ignore[arg-type]
    )

    def objective(trial: optuna.Trial) -> float:
        for step in range(0, steps + 1, 10):
            trial.report(trial.number, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(trial.number)

    study.optimize(objective, n_trials=8)
    assert {trial.last_step for trial in study.trials} <= set(range(0, steps + 1, 10))


def test_no_stage_starts_after_the_timeout(tune: Cli) -> None:
    result = tune("--stages", 60, "--timeout", 0.001, "--refine-steps", 5)

    n_stages = len(_load().trials)
    assert result.code == 0 and n_stages < 60
    assert (
        f"--timeout is over, after 0.001 seconds: {n_stages} of 60 stages were run, the best was "
        "not refined."
    ) in result.err


def test_enough_time_is_not_mentioned(tune: Cli) -> None:
    assert "--timeout" not in tune("--stages", 1, "--timeout", 1e6).err


def test_refining_says_whether_it_helped(tune: Cli) -> None:
    tune("--stages", 1, "--steps", 1, "--lr", 0.02)
    helped = tune("--stages", 0, "--lr", 0.02, "--refine-steps", 20).err
    wild = tune("--stages", 0, "--text-lr", 1e30, "--lr", 1e30, "--refine-steps", 20).err

    first, second, third = _load().trials
    assert "Refining the best stage for 20 steps at most." in helped
    assert f"Refined stage 0 from loss {first.value:.3f} to {second.value:.3f} in " in helped
    assert "Refining stage 1 did not help, stopped after 2 of 20 steps." in wild
    assert third.value == second.value


def test_a_patience_is_that_of_refining_too(tune: Cli) -> None:
    tune("--stages", 1, "--text-prompts", 0)
    tune(
        *("--stages", 0, "--text-prompts", 0, "--patience", 2, "--lr", 1e3),
        *("--refine-steps", 50),
    )
    assert _load().trials[1].user_attrs["stage_steps"] == 4


FAULTS = {
    "metric": ("--metric", "f1"),
    "patience": ("--patience", 0),
    "schedule": ("--schedule", "linear"),
    "text-lr": ("--text-lr", 0),
    "text-steps": ("--text-steps", -1),
    "text-prompts": ("--text-prompts", -1),
    "pruner": ("--pruner", "best"),
    "timeout": ("--timeout", -1),
}


@pytest.mark.parametrize("args", FAULTS.values(), ids=FAULTS.keys())
def test_a_bad_value_is_one_line(tune: Cli, args: tuple[object, ...]) -> None:
    result = tune(*args)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1 and f"'{args[0]}'" in result.err


def test_every_option_is_in_the_docs() -> None:
    """All of those that say how to train."""
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    for name in (*FAULTS, "search", "later-texts", "refine-steps"):
        assert f"--{name}" in text


def test_a_stage_without_a_record_has_the_studys_metric(tune: Cli, cli: Cli) -> None:
    tune("--stages", 1, "--metric", "accuracy")
    study = _load()
    study.tell(study.ask(), 0.1)
    stages = cli("show", "--json").json["stages"]
    assert [(stage["metric"], stage["value"]) for stage in stages] == [
        ("accuracy", study.trials[0].value),
        ("accuracy", 0.1),
    ]
    assert stages[1]["loss"] is None
