"""A study of the demo, recorded before the seams were redrawn: it must come out the same."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest

import optuna_llm_catalyst
from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained


REPLIES = [
    [
        "this customer message is about a",
        "the customer wants help with their",
        "support request about the topic of",
        "the writer of this asks for",
    ],
    [
        "a complaint to the shop about",
        "the main reason for this message is",
        "our service team should handle this",
        "customer intent of the message",
    ],
]
#: Loss before and after training, accuracy, sequences, and the restart prompt's first words.
STAGES = [
    (1.4271329641, 1.2640032768, 21 / 48, 138, "baltimore gonzales"),
    (1.4408050776, 1.2630310059, 24 / 48, 138, "mexican pilots"),
    (1.4220782518, 1.2913789749, 23 / 48, 138, "importance thumped"),
    (1.1568437815, 1.0726414919, 30 / 48, 162, "the writer of this asks for"),
    (1.1622055769, 1.0884610415, 25 / 48, 162, "our service team should handle this"),
]


@pytest.fixture(scope="module")
def objective(
    minilm: Pretrained, tmp_path_factory: pytest.TempPathFactory
) -> PromptTuningObjective:
    folder = Path(optuna_llm_catalyst.__file__).parent / "demo" / "customer_support"
    task = few_shot(load_task(folder), shots=8, seed=0)
    store = FileSystemArtifactStore(base_path=str(tmp_path_factory.mktemp("artifacts")))
    return PromptTuningObjective(
        DualEncoderClassifier(minilm, task.labels),
        task,
        PromptSpace(minilm.tokenizer, 8),
        stage=GradientStage(n_steps=10),
        n_text_prompts=0,
        artifact_store=store,
    )


def test_recorded_demo_replays_to_the_same_losses(objective: PromptTuningObjective) -> None:
    """On the machine of the record the losses were equal to the last bit."""
    replies = ReplayProvider([json.dumps({"prompts": prompts}) for prompts in REPLIES])
    sampler = LLMCatalystSampler(
        objective.space, replies, n_startup_trials=3, screen=objective.score, seed=0
    )
    study = optuna.create_study(sampler=sampler)

    study.optimize(objective, n_trials=5)

    for trial, (before, after, accuracy, sequences, words) in zip(
        study.trials, STAGES, strict=True
    ):
        trajectory = load_trajectory(trial)
        assert trajectory is not None
        assert trial.user_attrs["prompt"].startswith(words)
        assert trajectory.points[0].loss == pytest.approx(before, abs=1e-3)
        assert trial.value == pytest.approx(after, abs=1e-3)
        assert trial.user_attrs["accuracy"] == pytest.approx(accuracy, abs=1.5 / 48)
        assert trial.user_attrs["forward_sequences"] == sequences
        assert trial.user_attrs["backward_passes"] == 11
