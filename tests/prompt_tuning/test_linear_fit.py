"""A fitted readout is the one minimum of its loss, and is chosen by the validation split."""

from __future__ import annotations

from collections.abc import Callable
import math
from math import inf
from math import nan

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.linear_fit import choose_fit
from optuna_llm_catalyst.prompt_tuning.linear_fit import Data
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_readout
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_towards
from optuna_llm_catalyst.prompt_tuning.linear_fit import INVERSE_STRENGTHS
from optuna_llm_catalyst.prompt_tuning.linear_fit import linear_probe
from optuna_llm_catalyst.prompt_tuning.linear_fit import PULLS
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.linear_fit import SCALES


def make_task(n: int, width: int, n_labels: int, seed: int = 0) -> tuple[Data, Data, Tensor]:
    """Train and validation of unit features, and a start that knows half of the truth.

    As encoders' features, they are large in a few directions and much alike in all.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_labels, width, generator=generator)
    sizes = torch.logspace(0, -1.5, width)

    def features(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), width, generator=generator)
        return F.normalize((centres[labels] + 2 * noise) * sizes + 0.5 * sizes, dim=-1)

    def split() -> Data:
        labels = torch.randperm(n, generator=generator) % n_labels
        return features(labels), labels

    wrong = torch.randn(n_labels, width, generator=generator)
    return split(), split(), F.normalize((centres + wrong) * sizes, dim=-1)


def penalised(data: Data, start: Tensor, scale: float, pull: float, rows: Tensor) -> Tensor:
    """What a fit minimises, as its definition has it; ``rows`` as of ``rows_of``."""
    features, labels = data[0].double(), data[1]
    features = torch.cat([features, torch.ones(len(features), 1)], 1)  # (n, d + 1)
    moved = rows - F.pad(start.double(), (0, 1))
    return F.cross_entropy(scale * features @ rows.T, labels) + pull * moved.square().sum()


def rows_of(readout: Readout) -> Tensor:
    """The weights, and as those of one more feature the biases: (C, d + 1)."""
    bias = torch.zeros(len(readout.weights)) if readout.bias is None else readout.bias
    return torch.cat([readout.weights, bias[:, None] / readout.scale], 1).double()


def loss_of(readout: Readout, data: Data) -> float:
    return F.nll_loss(readout.log_probs(data[0]), data[1]).item()


def accuracy_of(readout: Readout, data: Data) -> float:
    return (readout.log_probs(data[0]).argmax(-1) == data[1]).double().mean().item()


SIZES = [(12, 8, 3), (30, 40, 2), (60, 12, 6)]
each_size = pytest.mark.parametrize(("n", "width", "n_labels"), SIZES)
each_strength = pytest.mark.parametrize(
    ("scale", "pull"), [(10.0, 10.0), (20.0, 0.3), (50.0, 0.01)]
)


# Fitting.


@each_size
@each_strength
def test_a_fit_is_where_another_optimiser_ends_from_any_start(
    n: int, width: int, n_labels: int, scale: float, pull: float
) -> None:
    train, _, start = make_task(n, width, n_labels)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        rows = torch.from_numpy(flat).view_as(fitted).requires_grad_()
        loss = penalised(train, start, scale, pull, rows)
        (slope,) = torch.autograd.grad(loss, rows)
        return loss.item(), slope.flatten().numpy()

    fitted = rows_of(fit_towards(*train, start, scale=scale, pull=pull))
    for seed in range(2):
        initial = np.random.default_rng(seed).normal(size=fitted.numel())
        options = {"maxiter": 10_000, "maxfun": 100_000, "gtol": 1e-8, "ftol": 0.0}
        end = scipy.optimize.minimize(
            objective, initial, jac=True, method="L-BFGS-B", options=options
        )
        found = torch.from_numpy(end.x).view_as(fitted)
        # Added to each label alike, a bias changes no probability and is pulled to 0 slowly.
        for rows in (fitted, found):
            rows[:, -1] -= rows[:, -1].mean()
        # A weak pull leaves a flat valley, in which two optimisers stop a little apart.
        torch.testing.assert_close(fitted, found, rtol=0, atol=1e-3)


@each_size
def test_a_weaker_pull_fits_better_and_goes_further(n: int, width: int, n_labels: int) -> None:
    train, _, start = make_task(n, width, n_labels)
    pulls = [inf, *reversed(PULLS)]
    fits = [fit_towards(*train, start, scale=20, pull=pull) for pull in pulls]
    losses = [loss_of(fitted, train) for fitted in fits]
    distances = [(rows_of(fitted) - rows_of(fits[0])).norm().item() for fitted in fits]
    assert losses == sorted(losses, reverse=True)
    assert distances == sorted(distances)
    assert losses[-1] < losses[0]


def test_an_infinite_pull_gives_the_start_and_a_huge_one_nearly() -> None:
    train, _, start = make_task(12, 8, 3)
    same = fit_towards(*train, start, scale=20, pull=inf)
    assert torch.equal(same.weights, start) and same.bias is None and same.scale == 20
    near = fit_towards(*train, start, scale=20, pull=1e6)
    torch.testing.assert_close(rows_of(near), rows_of(same), rtol=0, atol=1e-4)


def test_a_fit_learns_a_bias_where_the_features_say_nothing() -> None:
    """Three of four examples have the second label; the light pull costs little of that."""
    features, labels = torch.zeros(40, 4), torch.tensor([0, 1, 1, 1] * 10)
    fitted = fit_towards(features, labels, torch.randn(2, 4), scale=20, pull=1e-3)
    assert fitted.log_probs(features[:1]).exp()[0, 1].item() == pytest.approx(0.75, abs=1e-3)


@each_size
def test_the_same_arguments_give_the_same_fit(n: int, width: int, n_labels: int) -> None:
    """Bit for bit."""
    train, validation, start = make_task(n, width, n_labels)
    one, other = (
        fit_readout(train, validation, Readout(start, 20), scales=(20,)) for _ in range(2)
    )
    assert torch.equal(one.readout.weights, other.readout.weights)
    assert one.fit == other.fit
    probes = [linear_probe(train, validation, n_labels) for _ in range(2)]
    assert torch.equal(probes[0].weights, probes[1].weights)


@each_size
def test_the_order_of_examples_does_not_matter(n: int, width: int, n_labels: int) -> None:
    (features, labels), _, start = make_task(n, width, n_labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    one = fit_towards(features, labels, start, scale=20, pull=0.1)
    other = fit_towards(features[order], labels[order], start, scale=20, pull=0.1)
    torch.testing.assert_close(rows_of(one), rows_of(other), rtol=0, atol=1e-4)


def test_a_label_without_an_example_keeps_its_direction() -> None:
    """It is pushed away from the other labels' texts only."""
    train, validation, start = make_task(30, 40, 3)
    weights = torch.cat([start, F.normalize(torch.randn(1, 40), dim=-1)])
    fitted = fit_readout(train, validation, Readout(weights, 20)).readout
    assert fitted.weights.shape == (4, 40)
    assert F.cosine_similarity(fitted.weights[3], weights[3], dim=0) > 0.5
    assert fitted.log_probs(train[0]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_fitted_is_float32_and_has_no_gradient(dtype: torch.dtype) -> None:
    (features, labels), validation, start = make_task(12, 8, 3)
    train = (features.to(dtype).requires_grad_(), labels)
    validation = (validation[0].to(dtype), validation[1])
    fitted = fit_readout(train, validation, Readout(start.requires_grad_(), 20)).readout
    probe = linear_probe(train, validation, 3)
    for tensor in (fitted.weights, fitted.bias, probe.weights, probe.bias):
        assert tensor is not None
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad


# Choosing.


@each_size
def test_the_chosen_fit_is_the_most_accurate_and_of_these_has_the_lowest_loss(
    n: int, width: int, n_labels: int
) -> None:
    train, validation, start = make_task(n, width, n_labels)
    chosen = choose_fit(train, validation, Readout(start, 5))
    tried = {(5.0, inf): Readout(start, 5)}
    for scale in SCALES:
        for pull in (inf, *PULLS):
            tried[scale, pull] = fit_towards(*train, start, scale=scale, pull=pull)
    ranks = {
        key: (-accuracy_of(readout, validation), loss_of(readout, validation))
        for key, readout in tried.items()
    }
    assert (chosen.scale, chosen.pull) == min(ranks, key=ranks.__getitem__)
    assert (-chosen.accuracy, chosen.loss) == pytest.approx(min(ranks.values()), abs=1e-5)


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_a_choice_is_never_worse_than_the_start(
    n: int, width: int, n_labels: int, seed: int
) -> None:
    train, validation, weights = make_task(n, width, n_labels, seed)
    start = Readout(weights, 20)
    fitted = fit_readout(train, validation, start, refit=False)
    assert fitted.fit.accuracy >= accuracy_of(start, validation)
    assert accuracy_of(fitted.readout, validation) == pytest.approx(fitted.fit.accuracy)
    expected = pytest.approx(fitted.fit.loss, abs=1e-4, rel=1e-4)
    assert loss_of(fitted.readout, validation) == expected


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("scales", [(10.0, 50.0), (0.01,)])
def test_nothing_is_fitted_where_it_would_mislead(scales: tuple[float, ...], refit: bool) -> None:
    """A scale of 0.01 gives no answer: the start's own is the better one."""
    _, (features, labels), _ = make_task(30, 40, 3)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    start = F.normalize(means - means.mean(0), dim=-1)
    validation, misleading = (features, labels), (features, (labels + 1) % 3)
    readout = Readout(start, 20)
    fitted = fit_readout(misleading, validation, readout, refit=refit, scales=scales)
    assert fitted.fit.pull == inf
    assert torch.equal(fitted.readout.weights, start)
    losses = {scale: loss_of(Readout(start, scale), validation) for scale in (20, *scales)}
    assert fitted.readout.scale == min(losses, key=losses.__getitem__)


def test_of_equal_losses_the_stronger_pull_is_chosen() -> None:
    """Features of 0 have the same probabilities under all weights."""
    train, validation, start = make_task(12, 8, 3)
    empty = (torch.zeros_like(validation[0]), validation[1])
    fit = choose_fit(train, empty, Readout(start, 20))
    assert fit.pull == inf
    assert fit.loss == pytest.approx(math.log(3))


def test_the_last_fit_is_on_both_splits() -> None:
    train, validation, start = make_task(30, 40, 3)
    readout = Readout(start, 20)
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    fit = choose_fit(train, validation, readout)
    assert fit.pull < inf
    for refit, data in ((True, both), (False, train)):
        fitted = fit_readout(train, validation, readout, refit=refit)
        assert fitted.fit == fit
        assert fitted.readout.scale == fit.scale
        expected = fit_towards(*data, start, scale=fit.scale, pull=fit.pull)
        assert torch.equal(rows_of(fitted.readout), rows_of(expected))


def test_a_fit_helps_where_the_start_knows_half_of_it() -> None:
    train, validation, start = make_task(90, 40, 6)
    _, test, _ = make_task(90, 40, 6)
    fitted = fit_readout(train, validation, Readout(start, 20)).readout
    assert accuracy_of(fitted, test) > accuracy_of(Readout(start, 20), test)


# The probe.


def scikit_learns(data: Data, c: float) -> LogisticRegression:
    probe = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, solver="newton-cg")
    return probe.fit(data[0].double().numpy(), data[1].numpy())


@pytest.mark.parametrize("seen", [(0, 1), (0, 1, 2), (1, 3), (0, 2, 3, 4)])
@pytest.mark.parametrize("c", [0.1, 10.0, 1000.0])
def test_a_probe_is_scikit_learns(seen: tuple[int, ...], c: float) -> None:
    """Also where only some of five labels have examples."""
    (one, other, _) = make_task(24, 16, len(seen))
    label_of = torch.tensor(seen)
    train, validation = ((features, label_of[labels]) for features, labels in (one, other))
    probe = linear_probe(train, validation, 5, inverse_strengths=[c])
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    theirs = scikit_learns(both, c).predict_proba(both[0].double().numpy())
    ours = probe.log_probs(both[0]).exp()
    torch.testing.assert_close(
        ours[:, label_of], torch.from_numpy(theirs).float(), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(ours.sum(-1), torch.ones(48))


@each_size
def test_a_probes_strength_is_chosen_by_validation_accuracy(
    n: int, width: int, n_labels: int
) -> None:
    train, validation, _ = make_task(n, width, n_labels)
    rows, labels = validation[0].double().numpy(), validation[1].numpy()
    accuracies = {c: scikit_learns(train, c).score(rows, labels) for c in INVERSE_STRENGTHS}
    best = max(INVERSE_STRENGTHS, key=lambda c: (accuracies[c], -c))
    chosen = linear_probe(train, validation, n_labels)
    expected = linear_probe(train, validation, n_labels, inverse_strengths=[best])
    assert torch.equal(chosen.weights, expected.weights)


def test_the_probe_of_one_label_predicts_it() -> None:
    train, validation, _ = make_task(4, 3, 1)
    probe = linear_probe(train, validation, 2)
    assert accuracy_of(probe, validation) == 1


# A readout, and what is refused.


def test_a_readout_gives_log_probabilities() -> None:
    (features, _), _, weights = make_task(12, 8, 3)
    bias = torch.tensor([0.0, 1.0, -1.0])
    expected = (7 * features @ weights.T + bias).softmax(-1)
    torch.testing.assert_close(Readout(weights, 7, bias).log_probs(features).exp(), expected)


def with_train(features: Tensor, labels: Tensor, **options: float) -> None:
    _, validation, start = make_task(12, 8, 3)
    fit_towards(features, labels, start, **{"scale": 20.0, "pull": 1.0} | options)


ROWS, TARGETS = make_task(12, 8, 3)[0]
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no example": (lambda: with_train(ROWS[:0], TARGETS[:0]), "training split has no example"),
    "other lengths": (lambda: with_train(ROWS, TARGETS[:5]), r"\(12, 8\) and \(5,\)"),
    "another width": (lambda: with_train(ROWS[:, :5], TARGETS), r"\(n, 8\).*\(12, 5\)"),
    "one example's vector": (lambda: with_train(ROWS[0], TARGETS[:1]), r"\(8,\)"),
    "no number": (lambda: with_train(ROWS * nan, TARGETS), "finite"),
    "a label too many": (lambda: with_train(ROWS, TARGETS + 1), "from 0 to 2, got 1 to 3"),
    "a negative label": (lambda: with_train(ROWS, TARGETS - 1), "from 0 to 2, got -1 to 1"),
    "no scale": (lambda: with_train(ROWS, TARGETS, scale=0.0), "`scales`.*0.0"),
    "a negative pull": (lambda: with_train(ROWS, TARGETS, pull=-1.0), "`pulls`.*-1.0"),
    "a pull that is no number": (lambda: with_train(ROWS, TARGETS, pull=nan), "`pulls`"),
    "a start without rows": (
        lambda: fit_towards(ROWS, TARGETS, ROWS[0], scale=20, pull=1),
        r"start.*\(8,\)",
    ),
    "a start that is no number": (
        lambda: fit_towards(ROWS, TARGETS, ROWS * nan, scale=20, pull=1),
        "start.*finite: False",
    ),
    "a start with a bias": (
        lambda: fit_readout((ROWS, TARGETS), (ROWS, TARGETS), Readout(ROWS[:3], 1, ROWS[0, :3])),
        "without a bias",
    ),
    "no validation": (
        lambda: linear_probe((ROWS, TARGETS), (ROWS[:0], TARGETS[:0]), 3),
        "validation split has no example",
    ),
    "no strength": (
        lambda: linear_probe((ROWS, TARGETS), (ROWS, TARGETS), 3, inverse_strengths=[]),
        "`inverse_strengths`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
