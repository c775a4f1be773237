"""The supervised contrastive loss, and the stage that lowers it."""

from __future__ import annotations

from dataclasses import replace
import math

import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning.models import HasHead
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages.contrastive import contrastive_losses

from .tiny import make_dual
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_sequence
from .tiny import make_task


LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def slowly(features: Tensor, labels: Tensor, temperature: float) -> float:
    """Equation 2 as it is written, for one prompt."""
    z, n = F.normalize(features, dim=-1), len(labels)
    found = []
    for i in range(n):
        others = [a for a in range(n) if a != i]
        same = [p for p in others if labels[p] == labels[i]]
        if same:
            total = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
            logs = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / total) for p in same]
            found.append(-sum(logs) / len(same))
    return sum(found) / len(found)


def make_features(n_prompts: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_prompts, len(LABELS), 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_is_the_papers(temperature: float) -> None:
    features = make_features()
    found = contrastive_losses(features, LABELS, temperature)
    expected = [slowly(rows, LABELS, temperature) for rows in features]
    assert found.tolist() == pytest.approx(expected)


def test_its_laws() -> None:
    """Lengths and the examples' order change nothing; perfect groups cost next to nothing."""
    features, order = make_features(), torch.tensor([3, 5, 0, 1, 4, 2])
    found = contrastive_losses(features, LABELS, 0.5)
    longer = contrastive_losses(7 * features, LABELS, 0.5)
    turned = contrastive_losses(features[:, order], LABELS[order], 0.5)
    for other in (longer, turned):
        torch.testing.assert_close(found, other)
    labels = torch.tensor([0, 0, 1, 1])
    grouped = torch.eye(2, dtype=torch.float64)[labels].unsqueeze(0)
    assert contrastive_losses(grouped, labels, 0.01).item() < 1e-6
    assert contrastive_losses(grouped, labels.flip(0).roll(1), 0.01).item() > 10


def test_texts_without_another_of_their_label_count_nothing() -> None:
    features = make_features()[:, :4].requires_grad_()
    found = contrastive_losses(features, torch.arange(4), 0.1)
    assert found.tolist() == [0, 0, 0]
    found.sum().backward()
    assert features.grad is not None and not features.grad.any()


def make_run() -> Run:
    model = make_sequence()
    train = model.encode(make_examples(24, seed=1))
    return Run(model, model.start([[20, 21, 22]], train), train, train, 0)


def test_a_stage_of_it_learns_and_keeps_a_head_that_is_fitted() -> None:
    seen: list[Evaluation] = []
    run = replace(make_run(), observe=lambda now: bool(seen.append(now)))
    stage = ContrastiveStage(n_steps=20, lr=0.03, eval_every=10)
    stage.run(run)
    model = run.model
    assert isinstance(model, HasHead)
    features = [model.prompted_features(now.prompt, run.train) for now in seen]
    first, *_, last = (
        contrastive_losses(rows, run.train.labels, stage.temperature).item() for rows in features
    )
    assert last < first - 0.05
    with torch.no_grad():
        fitted = model.fresh_head(seen[-1].prompt, run.train)
        found = losses(model.log_probs(fitted, run.train), run.train.labels).item()
    assert seen[-1].loss == pytest.approx(found, abs=1e-5)


def test_a_model_without_a_head_is_refused(store: object) -> None:
    with pytest.raises(ValueError, match="ContrastiveStage needs a model with a linear head"):
        make_objective(store=store, model=make_dual(), stage=ContrastiveStage())  # type: ignore[arg-type]


def test_a_task_of_one_example_a_label_is_refused(store: object) -> None:
    task = make_task(train=make_examples(3, seed=1))
    with pytest.raises(ValueError, match="no label has two training examples"):
        make_objective("sequence", store=store, task=task, stage=ContrastiveStage())  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_named(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        ContrastiveStage(temperature=temperature)
