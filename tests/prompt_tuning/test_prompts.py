"""Prompts as named tensors with a leading ``P``."""

from __future__ import annotations

from collections.abc import Callable
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.prompts import both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import KINDS
from optuna_llm_catalyst.prompt_tuning.prompts import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import one_side
from optuna_llm_catalyst.prompt_tuning.prompts import Placement
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.prompts import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split


SIDES: tuple[Side, ...] = ("texts", "labels")
each_side = pytest.mark.parametrize("side", SIDES)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
TWO_SIDED = TwoSidedPrompt()
#: All that kinds read of an input.
BATCH = Split((), torch.zeros(0, dtype=torch.long), {}, (), lambda: torch.ones(1, 5) / 5**0.5)


def numbers(*shape: int) -> Tensor:
    """Numbers that are all different."""
    return torch.arange(float(math.prod(shape))).view(shape)


def make_prompt(n: int = 3, length: int = 2, width: int = 4, *, side: Side = "texts") -> Prompt:
    return Prompt(SOFT, SOFT.start(numbers(n, length, width), Placement((side,), 2, 9)))


def placement(kind: SoftPrompt, side: Side) -> Placement:
    """Where a model takes a kind of prompt whose usual side is given."""
    [other] = set(SIDES) - {side}
    sides = (side, other) if isinstance(kind, TwoSidedPrompt) else (side,)
    return Placement(sides, 2, 9, layer_width=4, encoding_width=5)


def make_head(n: int) -> dict[str, Tensor]:
    return {"weight": numbers(n, 2, 4) + 100, "bias": numbers(n, 2) + 200}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def assert_same_layers(actual: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[layer], expected[layer]) for layer in expected)


# Laws of every kind.


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_found_by_its_name(name: str) -> None:
    assert KINDS[name].name == name


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@each_side
@given(SHAPES)
def test_a_start_can_be_read_as_its_words(
    kind: SoftPrompt, side: Side, shape: tuple[int, int, int]
) -> None:
    embeddings = numbers(*shape)
    prompt = Prompt(kind, kind.start(embeddings, placement(kind, side)))
    assert len(prompt) == shape[0]
    assert torch.equal(prompt.words(), embeddings)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@each_side
def test_a_prompt_stands_on_a_side_that_the_model_has(kind: SoftPrompt, side: Side) -> None:
    where = placement(kind, side)
    prompt = Prompt(kind, kind.start(numbers(3, 2, 4), where))
    for other in set(SIDES) - set(where.sides):
        assert prompt.layers(other, BATCH) == {}
    for layer, tokens in prompt.layers(side, BATCH).items():
        assert layer < 2
        assert (len(tokens), tokens.shape[1], tokens.shape[3]) == (3, 1, 4)


def test_two_sides_start_at_the_same_words_and_are_two_tensors() -> None:
    prompt = Prompt(TWO_SIDED, TWO_SIDED.start(numbers(3, 2, 4), placement(TWO_SIDED, "labels")))
    labels, texts = (prompt.layers(side, BATCH)[0] for side in ("labels", "texts"))
    assert torch.equal(labels, texts)
    prompt.tensors["texts"].add_(1)
    assert torch.equal(prompt.layers("labels", BATCH)[0], labels)
    assert torch.equal(prompt.words(), labels.squeeze(1))


@each_side
def test_one_side_of_two_is_a_soft_prompt_of_that_side(side: Side) -> None:
    prompt = Prompt(TWO_SIDED, TWO_SIDED.start(numbers(3, 2, 4), placement(TWO_SIDED, side)))
    one = one_side(prompt.with_head(make_head(3)), side)
    assert one.kind == SOFT
    assert one.tensors.keys() == {side, "head.weight", "head.bias"}
    assert torch.equal(one.words(), prompt.tensors[side])


@pytest.mark.parametrize(
    "kind",
    [TwoSidedPrompt(), TwoSidedDeepPrompt(), TwoSidedLowRankPrompt(rank=2, hidden=3)],
    ids=["soft", "deep", "lowrank"],
)
def test_a_prompt_of_two_sides_is_its_sides_together(kind: TwoSidedPrompt) -> None:
    start = kind.start(numbers(3, 2, 4), placement(kind, "labels"))
    prompt = Prompt(kind, {name: tensor + i for i, (name, tensor) in enumerate(start.items())})
    labels, texts = (one_side(prompt, side) for side in ("labels", "texts"))
    assert on_both_sides(labels.kind) == both_sides(labels, texts).kind == kind
    assert_same(both_sides(labels, texts).tensors, prompt.tensors)
    for side, one in (("labels", labels), ("texts", texts)):
        assert_same_layers(one.layers(side, BATCH), prompt.layers(side, BATCH))


@each_side
def test_a_model_of_one_side_takes_no_prompt_of_two(side: Side) -> None:
    with pytest.raises(ValueError, match=f"this one takes prompts before: {side}"):
        TWO_SIDED.start(numbers(1, 2, 3), Placement((side,), 2, 9))


@each_side
def test_a_soft_prompt_stands_at_the_input(side: Side) -> None:
    prompt = make_prompt(side=side)
    [(layer, tokens)] = prompt.layers(side, BATCH).items()
    assert layer == 0
    assert torch.equal(tokens, prompt.words().unsqueeze(1))


def test_a_soft_prompt_takes_the_usual_side_first() -> None:
    assert SOFT.start(numbers(1, 2, 3), Placement(("labels", "texts"), 2, 9)).keys() == {"labels"}


def test_a_head_is_no_virtual_token() -> None:
    prompt = make_prompt()
    with_head = prompt.with_head(make_head(3))
    assert torch.equal(with_head.words(), prompt.words())
    assert_same(prompt.layers("texts", BATCH), with_head.layers("texts", BATCH))  # type: ignore[arg-type]


# Laws of the leading dimension.


@given(SHAPES, st.data())
def test_picked_prompts_are_those_prompts(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    prompt = make_prompt(*shape).with_head(make_head(shape[0]))
    index = data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=6))
    picked = prompt[index]
    assert (len(picked), picked.kind) == (len(index), prompt.kind)
    assert_same(picked.tensors, {name: t[index] for name, t in prompt.tensors.items()})
    assert_same(prompt[:].tensors, prompt.tensors)


@given(SHAPES)
def test_a_mapped_prompt_keeps_its_size_and_kind(shape: tuple[int, int, int]) -> None:
    prompt = make_prompt(*shape).with_head(make_head(shape[0]))
    mapped = prompt.map(lambda tensor: tensor * 2)
    assert (len(mapped), mapped.kind) == (len(prompt), prompt.kind)
    assert_same(mapped.tensors, {name: t * 2 for name, t in prompt.tensors.items()})


@given(SHAPES)
def test_a_head_comes_back(shape: tuple[int, int, int]) -> None:
    n = shape[0]
    prompt = make_prompt(*shape)
    assert prompt.head == {}
    assert_same(prompt.with_head(make_head(n)).head, make_head(n))
    again = prompt.with_head(make_head(n)).with_head({"bias": numbers(n, 2)})
    assert_same(again.head, make_head(n) | {"bias": numbers(n, 2)})
    assert_same(prompt.with_head({}).tensors, prompt.tensors)


@given(SHAPES)
def test_a_head_of_one_prompt_serves_all(shape: tuple[int, int, int]) -> None:
    prompt = make_prompt(*shape).with_head(make_head(1))
    assert len(prompt) == shape[0]
    for name, rows in prompt.head.items():
        assert torch.equal(rows, make_head(1)[name].repeat(shape[0], *[1] * (rows.ndim - 1)))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "unequal sizes": (
        lambda: Prompt(SOFT, {"texts": numbers(2, 1, 1), "head.bias": numbers(3, 1)}),
        r"one leading size, got {'texts': 2, 'head.bias': 3}",
    ),
    "another number of heads": (
        lambda: make_prompt(3).with_head(make_head(2)),
        r"one leading size, got {'texts': 3, 'head.weight': 2, 'head.bias': 2}",
    ),
    "no tensors": (lambda: Prompt(SOFT, {}), "one leading size, got {}"),
    "a tensor without dimensions": (
        lambda: Prompt(SOFT, {"texts": torch.tensor(1.0)}),
        r"one leading size, got {'texts': None}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_must_have_one_leading_size(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["texts", "head.weight", "head.bias"])
def test_one_number_that_is_not_finite_shows(name: str, value: float) -> None:
    prompt = make_prompt().with_head(make_head(3))
    assert prompt.is_finite()
    prompt.tensors[name].flatten()[-1] = value
    assert not prompt.is_finite()


def test_gradients_flow_through_all_that_a_prompt_does() -> None:
    embeddings, bias = numbers(2, 3, 4).requires_grad_(), numbers(1, 2).requires_grad_()
    prompt = Prompt(SOFT, SOFT.start(embeddings, Placement(("texts",), 2, 9)))
    picked = prompt.with_head({"bias": bias})[[1]].map(lambda tensor: tensor * 3)
    (picked.layers("texts", BATCH)[0].sum() + picked.head["bias"].sum()).backward()
    assert embeddings.grad is not None
    assert bias.grad is not None
    assert embeddings.grad[0].abs().max() == 0
    assert torch.equal(embeddings.grad[1], torch.full((3, 4), 3.0))
    assert torch.equal(bias.grad, torch.full((1, 2), 3.0))
