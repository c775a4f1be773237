"""Splits: rows stay together, and only padding is trimmed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch

from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning.split import Field
from optuna_llm_catalyst.prompt_tuning.split import Late
from optuna_llm_catalyst.prompt_tuning.split import Split


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def make_split(lengths: list[int]) -> Split:
    """Fields that hold their example's number where it has tokens, padded to the longest."""
    n, longest = len(lengths), max(lengths)
    tokens = torch.zeros(n, longest, dtype=torch.long)
    for i, length in enumerate(lengths):
        tokens[i, :length] = i + 1
    pixels = torch.arange(n).view(n, 1, 1).repeat(1, 10, longest)
    fields = {
        "input_ids": Field(tokens, pad_axis=1),
        "states": Field(tokens.unsqueeze(1).repeat(1, 4, 1), pad_axis=2),
        "pixels": Field(pixels),
        "features": Field(torch.arange(n)),
    }
    examples = tuple(Example(f"text {i}", i % 3) for i in range(n))
    return Split(examples, torch.arange(n) % 3, fields, tuple(lengths))


@given(LENGTHS, st.data())
def test_a_selection_keeps_rows_together(lengths: list[int], data: st.DataObject) -> None:
    split = make_split(lengths)
    n = len(lengths)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    chosen = split.select(indices)
    assert len(chosen) == len(indices)
    assert chosen.examples == tuple(split.examples[i] for i in indices)
    assert chosen.lengths == tuple(lengths[i] for i in indices)
    assert chosen.labels.tolist() == [i % 3 for i in indices]
    assert chosen.rows("features").tolist() == indices
    assert chosen.rows("pixels")[:, 0, 0].tolist() == indices
    assert chosen.rows("input_ids")[:, 0].tolist() == [i + 1 for i in indices]


@given(LENGTHS, st.data())
def test_a_selection_trims_padding_and_nothing_else(
    lengths: list[int], data: st.DataObject
) -> None:
    split = make_split(lengths)
    n = len(lengths)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    chosen = split.select(indices)
    longest = max(lengths[i] for i in indices)
    assert chosen.rows("input_ids").shape == (len(indices), longest)
    assert chosen.rows("states").shape == (len(indices), 4, longest)
    assert torch.equal(chosen.rows("pixels"), split.rows("pixels")[indices])
    assert (chosen.rows("input_ids") > 0).sum(1).tolist() == list(chosen.lengths)
    assert {name: field.pad_axis for name, field in chosen.fields.items()} == {
        name: field.pad_axis for name, field in split.fields.items()
    }


@given(LENGTHS, st.data())
def test_a_selection_of_a_selection_is_a_selection(
    lengths: list[int], data: st.DataObject
) -> None:
    split = make_split(lengths)
    n = len(lengths)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    again = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1, max_size=12))
    twice, once = split.select(indices).select(again), split.select([indices[i] for i in again])
    assert (twice.examples, twice.lengths) == (once.examples, once.lengths)
    assert torch.equal(twice.labels, once.labels)
    assert all(torch.equal(twice.rows(name), once.rows(name)) for name in split.fields)


@given(LENGTHS, st.integers(1, 25))
def test_batches_have_every_example_once(lengths: list[int], size: int) -> None:
    batches = list(make_split(lengths).batches(size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(lengths) // size)


@given(LENGTHS, st.integers(1, 25))
def test_batches_have_like_lengths(lengths: list[int], size: int) -> None:
    """Each batch begins where the one before it ends: no other cut is padded less."""
    ranges = [
        (min(lengths[i] for i in batch), max(lengths[i] for i in batch))
        for batch in make_split(lengths).batches(size)
    ]
    assert all(one[1] <= two[0] for one, two in zip(ranges, ranges[1:], strict=False))


@given(LENGTHS)
def test_one_batch_keeps_the_given_order(lengths: list[int]) -> None:
    assert list(make_split(lengths).batches(len(lengths))) == [list(range(len(lengths)))]


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(KeyError, match="positions"):
        make_split([1, 2]).rows("positions")


def test_encodings_are_computed_once_for_all_selections_and_only_if_asked_for() -> None:
    asked = []

    def compute() -> torch.Tensor:
        asked.append(len(asked))
        return torch.arange(12.0).view(6, 2)

    split = replace(make_split([1, 2, 3, 4, 5, 6]), encodings=Late(compute))
    some = split.select([4, 1, 3])
    again = some.select([2, 0])
    assert asked == []
    assert again.encodings().tolist() == [[6, 7], [8, 9]]
    assert some.encodings()[:, 0].tolist() == [8, 2, 6]
    assert split.encodings().shape == (6, 2)
    assert asked == [0]


def test_encodings_that_were_first_asked_for_without_gradients_can_be_trained_on() -> None:
    weight = torch.ones(2, requires_grad=True)
    split = replace(make_split([1, 2]), encodings=Late(lambda: weight.detach() * torch.ones(2, 2)))
    with torch.inference_mode():
        split.select([1]).encodings()
    (split.encodings() @ weight).sum().backward()
    assert weight.grad is not None


def test_examples_may_have_no_encodings() -> None:
    with pytest.raises(ValueError, match="come without encodings"):
        make_split([1, 2]).select([1]).encodings()
