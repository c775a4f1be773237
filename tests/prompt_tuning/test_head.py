"""A fresh head is the one minimum of a regularised loss, whatever stands beside it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
from sklearn.linear_model import LogisticRegression
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models.head import fit_heads
from optuna_llm_catalyst.prompt_tuning.models.head import linear

from .tiny import features
from .tiny import hard
from .tiny import LABELS
from .tiny import make_examples
from .tiny import make_sequence


def random_features(n: int, width: int, n_labels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (2, n, d) as encoders give them: large in a few directions, alike in most."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -2, width)
    labels = torch.arange(n) % n_labels
    centres = torch.randn(2, n_labels, width, generator=generator)[:, labels]
    noise = torch.randn(2, n, width, generator=generator)
    rows = (noise + centres) * scale + torch.randn(width, generator=generator)
    return F.normalize(rows, dim=-1) * width**0.5, labels


def slope(rows: Tensor, labels: Tensor, head: dict[str, Tensor]) -> float:
    """The largest slope of one prompt's regularised loss, in float64."""
    weight = head["weight"].double().requires_grad_()
    bias = head["bias"].double().requires_grad_()
    loss = F.cross_entropy(rows.double() @ weight.T + bias, labels)
    (loss + 0.1 / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return max(weight.grad.abs().max().item(), bias.grad.abs().max().item())


def assert_same_fit(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rows: Tensor, labels: Tensor
) -> None:
    """What the slopes of two fits guarantee: near weights, and nearer losses.

    The penalty bounds how far apart weights can be; biases have none.
    """
    torch.testing.assert_close(actual["weight"], expected["weight"], rtol=1e-4, atol=1e-4)
    one_loss, other_loss = (
        F.cross_entropy(rows @ head["weight"].T + head["bias"], labels)
        for head in (actual, expected)
    )
    torch.testing.assert_close(one_loss, other_loss, rtol=1e-5, atol=1e-5)


def one(heads: dict[str, Tensor], p: int) -> dict[str, Tensor]:
    return {name: rows[p] for name, rows in heads.items()}


SIZES = [(12, 8, 3), (24, 32, 2), (96, 384, 6), (200, 64, 10)]
each_size = pytest.mark.parametrize(("n", "width", "n_labels"), SIZES)


@each_size
def test_a_head_is_where_the_loss_has_no_slope(n: int, width: int, n_labels: int) -> None:
    rows, labels = random_features(n, width, n_labels, seed=0)
    heads = fit_heads(rows, labels, n_labels)
    assert heads["weight"].shape == (2, n_labels, width)
    assert heads["bias"].shape == (2, n_labels)
    for p in range(2):
        assert slope(rows[p], labels, one(heads, p)) < 1e-5


@each_size
def test_the_same_arguments_give_the_same_head(n: int, width: int, n_labels: int) -> None:
    """Bit for bit."""
    rows, labels = random_features(n, width, n_labels, seed=1)
    heads, again = (fit_heads(rows, labels, n_labels) for _ in range(2))
    assert heads.keys() == again.keys() == {"weight", "bias"}
    assert all(torch.equal(heads[name], again[name]) for name in heads)


@each_size
def test_a_head_does_not_depend_on_the_prompts_beside_it(
    n: int, width: int, n_labels: int
) -> None:
    rows, labels = random_features(n, width, n_labels, seed=2)
    together = fit_heads(rows, labels, n_labels)
    for p in range(2):
        alone = fit_heads(rows[[p]], labels, n_labels)
        assert_same_fit(one(alone, 0), one(together, p), rows[p], labels)


@pytest.mark.parametrize(("n", "width", "n_labels"), [s for s in SIZES if s[2] > 2])
def test_a_head_is_scikit_learns(n: int, width: int, n_labels: int) -> None:
    """Two labels are left out: scikit-learn gives them one weight vector, not two."""
    rows, labels = random_features(n, width, n_labels, seed=3)
    heads = fit_heads(rows, labels, n_labels)
    for p in range(2):
        x, y = rows[p].double().numpy(), labels.numpy()
        theirs = LogisticRegression(C=1 / (n * 0.1), tol=1e-10, max_iter=1000, solver="newton-cg")
        theirs.fit(x, y)
        expected = {
            "weight": torch.from_numpy(theirs.coef_).float(),
            "bias": torch.from_numpy(theirs.intercept_).float(),
        }
        assert_same_fit(one(heads, p), expected, rows[p], labels)


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 4), st.data())
def test_any_labels_have_a_head(n: int, width: int, n_labels: int, data: st.DataObject) -> None:
    """Also where labels have no example, or all examples are alike."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.randn(1, n, width, generator=generator)
    if data.draw(st.booleans()):
        rows = rows[:, :1].expand(1, n, width)
    label = st.integers(0, n_labels - 1)
    labels = torch.tensor(data.draw(st.lists(label, min_size=n, max_size=n)))
    heads = fit_heads(rows, labels, n_labels)
    assert all(head.isfinite().all() for head in heads.values())
    assert slope(rows[0], labels, one(heads, 0)) < 1e-5


def test_a_label_without_an_example_is_hardly_ever_predicted() -> None:
    rows, labels = random_features(20, 8, 3, seed=4)
    heads = fit_heads(rows, labels, 4)
    log_probs = linear(rows, heads).log_softmax(-1)
    assert log_probs[..., 3].max() < math.log(1e-4)
    assert heads["weight"][:, 3].abs().max() < 1e-4


def test_a_head_has_no_gradient() -> None:
    rows, labels = random_features(12, 8, 3, seed=5)
    with torch.no_grad():
        heads = fit_heads(rows, labels, 3)
    assert not any(head.requires_grad for head in heads.values())
    assert all(head.dtype == torch.float32 for head in heads.values())


def test_the_order_of_examples_changes_no_head() -> None:
    rows, labels = random_features(24, 32, 3, seed=6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    heads = fit_heads(rows, labels, 3)
    shuffled = fit_heads(rows[:, order], labels[order], 3)
    for p in range(2):
        assert_same_fit(one(shuffled, p), one(heads, p), rows[p], labels)


# Within the model.


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_fresh_head_is_fitted_to_the_models_features(n_prompts: int) -> None:
    model = make_sequence()
    split = model.encode(make_examples(20, seed=7))
    prompt = hard(model, *("wolf new bread", "thing just over", "call the our")[:n_prompts])
    fresh = model.fresh_head(prompt, split)
    rows = features(model, prompt, split) * 32**0.5
    for p in range(n_prompts):
        assert slope(rows[p], split.labels, one(fresh.head, p)) < 1e-5
    assert max(evaluate(model, fresh, split).loss) < math.log(len(LABELS))
    assert not any(tensor.requires_grad for tensor in fresh.tensors.values())


def test_a_fresh_head_does_not_depend_on_prompts_beside_it_on_minilm(minilm: Pretrained) -> None:
    """Real features are all alike but for a small part, which makes the fit a hard one."""
    model = SequenceClassifier(minilm, LABELS)
    train = model.encode(make_examples(24, seed=7))
    validation = model.encode(make_examples(12, seed=8))
    texts = ("which topic is this", "calm green paper letter", "all of our words")
    # The last one has as many tokens as the others.
    ids = [minilm.tokenizer(text, add_special_tokens=False)["input_ids"][:3] for text in texts]
    prompt = model.start(ids, train)
    together = evaluate(model, prompt, validation)
    for p, loss in enumerate(together.loss):
        alone = evaluate(model, model.fresh_head(prompt[[p]], train), validation)
        assert alone.loss[0] == pytest.approx(loss, abs=1e-4)
        rows = model.prompted_features(prompt[[p]], train)[0]
        assert slope(rows, train.labels, one(prompt.head, p)) < 1e-5
