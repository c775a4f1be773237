"""`tune` with each method: chosen, shown, resumed, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import records
from tests.cli.conftest import Cli
from tests.prompt_tuning.test_causal_lm import make as causal_lm
from tests.prompt_tuning.test_masked_lm import make as masked_lm
from tests.prompt_tuning.tiny import LABELS


LOW_RANK = ("--prompt-kind", "lowrank", "--rank", 2)
METHODS: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "deep on both sides": (("--prompt-kind", "deep"), {"stage": "GradientStage"}),
    "contrastive": (
        (*("--stage", "contrastive", "--model-type", "sequence-classifier"), *LOW_RANK),
        {"stage": "ContrastiveStage", "temperature": 0.1},
    ),
    "low rank on both sides": (
        LOW_RANK,
        {"stage": "GradientStage", "gate_lr": 1e-4},
    ),
    "bbt": (
        ("--stage", "bbt", "--alpha", 0.5),
        {"stage": "BlackBoxStage", "n_queries": 21, "alpha": 0.5, "population_size": 5},
    ),
    "bbtv2": (("--stage", "bbtv2"), {"stage": "BlackBoxStage", "intrinsic_dim": 8}),
    "gdfo": (
        ("--stage", "gdfo", "--gd-weight", 0.7),
        {"stage": "DistilledStage", "gd_weight": 0.7, "n_queries": 21},
    ),
    "zo": (("--stage", "zo"), {"stage": "ZerothOrderStage", "lr": 5.0, "eval_every": 2}),
}
SHORT = ("--queries", 21, "--population-size", 5, "--intrinsic-dim", 8)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_and_resumes(tune: Cli, cli: Cli, name: str) -> None:
    options, settings = METHODS[name]
    first, second = (tune(*SHORT, *options, "--stages", 1) for _ in range(2))

    assert first.code == second.code == 0, first.err + second.err
    assert "Resuming study" in second.err and "was trained with" not in second.err
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    assert len(study.trials) == 2
    last = records.load(study.trials[-1], "stage", dict[str, Any])
    assert last is not None and settings.items() <= last["settings"].items()
    for trial in study.trials:
        has_gradient = settings["stage"] in ("GradientStage", "ContrastiveStage")
        assert (trial.user_attrs["backward_passes"] > 0) == has_gradient
        assert trial.user_attrs["forward_passes"] > 0
    # A linear head is fitted to its own prompt: there is no average of them to fit.
    assert ("fitted ensemble" in second.out) == ("sequence-classifier" not in options)
    assert ("trained here" in cli("show", "--trial", 0).out) == name.endswith("both sides")
    exported = cli("export", "out", "--model", "")
    assert exported.code == 0, exported.err


def test_a_student_that_is_left_out_is_said(tune: Cli) -> None:
    options = ("--stage", "gdfo", "--stages", 1, "--queries", 31, "--population-size", 5)
    result = tune(*options, "--intrinsic-dim", 2, "--alpha", 50)
    assert result.code == 0, result.err
    assert "The student agrees with the black box on " in result.err


def test_stages_are_trained_at_once(tune: Cli) -> None:
    result = tune("--stages", 3, "--stages-at-once", 2, "--text-prompts", 0)
    assert result.code == 0, result.err
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    starts = [trial.datetime_start for trial in study.trials]
    ends = [trial.datetime_complete for trial in study.trials]
    assert len(starts) == 3
    assert starts[1] < ends[0] <= ends[1] <= starts[2]  # type: ignore[operator]
    assert all(f"stage {number}: loss" in result.err for number in range(3))


def test_what_black_boxes_search_is_chosen_by_the_study(tune: Cli) -> None:
    tune(*SHORT, "--stage", "bbt", "--search", "alpha,intrinsic_dim", "--stages", 2)
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    for trial in study.trials:
        assert 0.2 <= trial.params["alpha"] <= 5
        assert 2 <= trial.params["intrinsic_dim"] <= 8
    assert len({trial.params["alpha"] for trial in study.trials}) == 2


def test_a_masked_language_model_is_tuned_exported_and_used(cli: Cli, data: Path) -> None:
    model, tokenizer = masked_lm("bert")
    for part in (model, tokenizer):
        part.save_pretrained("mlm")
    options = (
        *("tune", data, "--model", "mlm", "--model-type", "masked-lm", "--stages", 1),
        *("--steps", 2, "--eval-every", 1, "--num-virtual-tokens", 3),
        *("--verbalizer", "wild_animal=wolf,animal", "--template", "{text} {mask}"),
    )
    result = cli(*options)
    assert result.code == 0, result.err
    assert cli("export", "out").code == 0
    predicted = cli("predict", "out", "--text", "the bread")
    assert predicted.code == 0, predicted.err
    assert predicted.json["label"] in ("wild_animal", "food", "tool")
    other = cli(*options[:-2])
    assert "was made with --template '{text} {mask}', this command has ''" in other.err


def test_a_type_that_is_not_given_is_read_off_the_model(cli: Cli, data: Path) -> None:
    """And off the study that is resumed."""
    for part in causal_lm("gpt2"):
        part.save_pretrained("lm")
    options = (
        *("tune", data, "--model", "lm", "--stages", 1, "--steps", 2, "--eval-every", 1),
        *("--num-virtual-tokens", 3, "--verbalizer", "tool=saw,some tool"),
    )
    first = cli(*options, "--template", "{text} is")
    assert first.code == 0, first.err
    said = (
        "Model type causal-lm: its config.json says GPT2LMHeadModel; --model-type takes another."
    )
    assert said in first.err.splitlines()
    second = cli(*options, "--template", "{text} is")
    assert second.code == 0, second.err
    assert "Model type causal-lm: the study was made with it." in second.err.splitlines()
    assert cli("export", "out").code == 0
    assert cli("predict", "out", "--text", "the bread").json["label"] in LABELS


def test_a_study_of_the_time_before_keeps_its_type(tune: Cli) -> None:
    """When a model without a type was a dual encoder, whatever its config said."""
    model, tokenizer = masked_lm("bert")
    for part in (model, tokenizer):
        part.save_pretrained("mlm")
    first = tune("--model", "mlm", "--model-type", "dual-encoder", "--stages", 1)
    second = tune("--model", "mlm", "--stages", 1)
    assert first.code == second.code == 0, second.err
    assert "Model type" not in first.err
    assert "Model type dual-encoder: the study was made with it." in second.err
    assert "Resuming study" in second.err


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "bbt is shallow": (
        ("--stage", "bbt", "--prompt-kind", "deep"),
        "error: --stage bbt has soft prompts: for deep ones take --stage bbtv2.",
    ),
    "bbtv2 is deep": (
        ("--stage", "bbtv2", "--prompt-kind", "soft"),
        "error: --stage bbtv2 has deep prompts: for soft ones take --stage bbt.",
    ),
    "lowrank needs gradients": (
        ("--stage", "zo", "--prompt-kind", "lowrank"),
        "error: --prompt-kind lowrank is trained by gradients only: take --stage gradient, this "
        "is --stage zo.",
    ),
    "a rank of a soft prompt": (
        ("--rank", 2),
        "error: --rank needs --prompt-kind lowrank.",
    ),
    "what a stage has not": (
        ("--stage", "bbt", "--search", "lr"),
        "error: --search 'lr' is none of alpha, intrinsic_dim.",
    ),
    "a rate of bbt": (
        ("--stage", "bbt", "--lr", 0.1),
        "error: --stage bbt has no learning rate: leave --lr out.",
    ),
    "a schedule of zo": (
        ("--stage", "zo", "--schedule", "cosine"),
        "error: --schedule needs a stage with gradients, this is --stage zo.",
    ),
    "a patience of bbt": (
        ("--stage", "bbt", "--patience", 2),
        "error: --patience needs a stage with gradients, this is --stage bbt.",
    ),
    "steps of a text prompt of bbt": (
        ("--stage", "bbt", "--text-prompts", 1, "--text-steps", 5),
        "error: --text-steps needs a stage with gradients, this is --stage bbt.",
    ),
    "a rate of a text prompt of zo": (
        ("--stage", "zo", "--text-prompts", 1, "--text-lr", 0.1),
        "error: --text-lr needs a stage with gradients, this is --stage zo.",
    ),
    "a last stage of less than a population": (
        ("--stage", "bbt", "--refine-steps", 20),
        "error: --refine-steps 20: `n_queries` must be 0 or at least 21, the start and one",
    ),
    "no head": (
        ("--stage", "contrastive"),
        "error: ContrastiveStage needs a model with a linear head, such as SequenceClassifier; "
        "DualEncoderClassifier has none.",
    ),
    "an unknown method": (("--stage", "sgd"), "'sgd' is not one of"),
    "a template elsewhere": (
        ("--template", "{text} {mask}"),
        "error: --template needs --model-type masked-lm or causal-lm, this is --model-type dual-",
    ),
    "no verbalizer": (
        ("--model-type", "masked-lm", "--verbalizer", "food"),
        "error: --verbalizer 'food' is not LABEL=WORD,WORD with a label of wild_animal, food",
    ),
    "a verbalizer of nothing": (
        ("--model-type", "masked-lm", "--verbalizer", "fruit=apple"),
        "error: --verbalizer 'fruit=apple' is not LABEL=WORD,WORD",
    ),
    "a small population": (("--population-size", 3), "--population-size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(tune: Cli, name: str) -> None:
    options, message = REFUSED[name]
    result = tune(*options)
    assert result.code == 2
    assert message in result.err.splitlines()[-1] and "Traceback" not in result.err


def test_a_study_keeps_its_kind_of_prompt(tune: Cli) -> None:
    tune("--stages", 0)
    result = tune("--stages", 1, "--prompt-kind", "deep")
    assert result.code == 2
    assert "was made with --prompt-kind 'soft', this command has 'deep'" in result.err


def test_a_study_keeps_its_rank(tune: Cli) -> None:
    for rank, message in ((2, ""), (3, "was made with --rank 2, this command has 3")):
        result = tune("--stages", 0, "--prompt-kind", "lowrank", "--rank", rank)
        assert result.code == (2 if message else 0)
        assert message in result.err
