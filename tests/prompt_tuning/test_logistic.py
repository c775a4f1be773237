"""The solver finds the one minimum of each problem, wherever it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.logistic import fit_path
from optuna_llm_catalyst.prompt_tuning.logistic import logistic_regressions
from optuna_llm_catalyst.prompt_tuning.logistic import minimise
from optuna_llm_catalyst.prompt_tuning.logistic import rotate


def make_problem(n_problems: int, n: int, width: int, n_labels: int) -> dict[str, Tensor]:
    """Inputs whose columns differ a hundredfold in size, and offsets that are sure of a label."""
    generator = torch.Generator().manual_seed(n)
    double = {"generator": generator, "dtype": torch.float64}
    sizes = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return {
        "inputs": torch.randn(n_problems, n, width, **double) * sizes,
        "labels": torch.randint(n_labels, (n,), generator=generator),
        "offsets": 3 * torch.randn(n_problems, n, n_labels, **double),
        "penalties": torch.logspace(-2, 0, width, dtype=torch.float64),
        "initial": 2 * torch.randn(n_problems, n_labels, width, **double),
    }


each_size = pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (1, 12, 8, 3), (1, 40, 16, 2), (3, 24, 8, 5)]
)


@each_size
def test_there_is_no_slope_at_the_minimum(sizes: tuple[int, int, int, int]) -> None:
    problem = make_problem(*sizes)
    weights = minimise(**problem).requires_grad_()
    logits = problem["inputs"] @ weights.mT + problem["offsets"]
    for p in range(sizes[0]):
        loss = F.cross_entropy(logits[p], problem["labels"])
        (loss + (problem["penalties"] * weights[p].square()).sum()).backward(retain_graph=True)
    assert weights.grad is not None
    assert weights.grad.abs().max() < 5e-6


@each_size
def test_the_minimum_does_not_depend_on_where_the_search_starts(
    sizes: tuple[int, int, int, int],
) -> None:
    problem = make_problem(*sizes)
    from_zero = minimise(**problem | {"initial": torch.zeros_like(problem["initial"])})
    torch.testing.assert_close(minimise(**problem), from_zero, rtol=0, atol=1e-4)


@each_size
def test_each_point_of_a_path_is_the_minimum_of_its_penalty(
    sizes: tuple[int, int, int, int],
) -> None:
    problem = make_problem(*sizes)
    del problem["initial"]
    penalties = torch.outer(torch.tensor([10.0, 3.0, 1.0]).double(), problem.pop("penalties"))
    path = list(fit_path(**problem, penalties=penalties))
    assert len(path) == 3
    for penalty, weights in zip(penalties, path, strict=True):
        alone = minimise(**problem, penalties=penalty, initial=torch.zeros_like(weights))
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "width"), [(3, 8), (8, 3), (1, 4), (5, 5)])
def test_a_rotation_loses_nothing(n: int, width: int) -> None:
    features = torch.randn(2, n, width, dtype=torch.float64)
    inputs, directions = rotate(features)
    identity = torch.eye(min(n, width), dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(inputs @ directions, features)
    torch.testing.assert_close(directions @ directions.mT, identity)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 2, 2, 0, 2], [1, 1, 2, 1, 3]])
def test_labels_without_examples_do_not_change_the_fit_of_the_others(labels: list[int]) -> None:
    features = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor(labels)
    seen, index = targets.unique(return_inverse=True)
    penalties = [1.0, 0.01]
    some = list(logistic_regressions(features, targets, 5, penalties))
    alone = list(logistic_regressions(features, index, len(seen), penalties))
    unseen = [label for label in range(5) if label not in labels]
    for (weights, biases), (few_weights, few_biases) in zip(some, alone, strict=True):
        assert torch.equal(weights[:, seen], few_weights)
        assert torch.equal(biases[:, seen], few_biases)
        logits = features @ weights.mT + biases.unsqueeze(1)  # (P, B, C)
        assert logits.softmax(-1)[..., unseen].max() < 1e-6
        # Else an unseen label's bias would say nothing beside the others'.
        assert logits[..., seen].mean((1, 2)).abs().max() < 1e-9
