from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import json
import math
from typing import Any
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.schema import AnyFloat
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import encode
from optuna_llm_catalyst.schema import Row
from optuna_llm_catalyst.schema import SchemaError
from optuna_llm_catalyst.trajectory import Trajectory
from tests.test_mistakes import ANY_MISTAKES
from tests.test_trajectory import FINITE
from tests.test_trajectory import trajectories


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@dataclass(frozen=True)
class Leaf(Row):
    name: str
    weight: float
    note: str | None = None


@dataclass(frozen=True)
class Tree:
    kind: Literal["oak", "fir", 1]
    leaves: tuple[Leaf, ...] = ()
    size: int | None = None
    pair: tuple[int, str] = (0, "")
    extra: Mapping[str, float] = field(default_factory=dict)
    loss: AnyFloat = 0.0

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("thirteen is no size")


LEAVES = st.builds(Leaf, st.text(), FINITE, st.none() | st.text())
TREES = st.builds(
    Tree,
    st.sampled_from(["oak", "fir", 1]),
    st.lists(LEAVES, max_size=3).map(tuple),
    st.none() | st.integers(14),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(st.text(), FINITE, max_size=3),
    FINITE,
)


@pytest.mark.parametrize(
    ("kind", "values"),
    [(Tree, TREES), (Trajectory, trajectories(FINITE)), (Mistakes, ANY_MISTAKES)],
)
@given(data=st.data())
def test_what_is_encoded_is_decoded(kind: Any, values: Any, data: st.DataObject) -> None:
    value = data.draw(values)
    assert decode(kind, json.loads(json.dumps(encode(value), allow_nan=False))) == value


@given(trajectories())
def test_a_loss_that_is_not_finite_comes_back_as_nan(trajectory: Trajectory) -> None:
    again = decode(Trajectory, json.loads(json.dumps(encode(trajectory), allow_nan=False)))
    assert encode(again) == encode(trajectory)
    for before, after in zip(trajectory.points, again.points, strict=True):
        assert after.loss == before.loss or math.isnan(after.loss)


@pytest.mark.parametrize("kind", [Tree, Leaf, Trajectory, Mistakes])
@given(value=JSON)
def test_any_json_is_decoded_or_refused(kind: Any, value: Any) -> None:
    try:
        decoded = decode(kind, value)
    except SchemaError as error:
        assert len(str(error)) < 1_000
    else:
        assert isinstance(decoded, kind)


def tree(**fields: Any) -> dict[str, Any]:
    return {"kind": "oak", **fields}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "must be a whole number, got True"),
        (int, 1.0, "must be a whole number, got 1.0"),
        (float, True, "must be a number, got True"),
        (float, math.nan, "must be a number, got nan"),
        (float, math.inf, "must be a number, got inf"),
        (float, 10**400, "must be a number, got 1000"),
        (float, None, "must be a number, got None"),
        (bool, 1, "must be true or false, got 1"),
        (str, 1, "must be a text, got 1"),
        (type(None), 0, "must be null, got 0"),
        (int | str | None, 1.5, "must be a whole number or a text or null, got 1.5"),
        (list[int], "12", "must be a list, got '12'"),
        (list[int], [1, "2"], "\"[1]\" must be a whole number, got '2'"),
        (tuple[int, str], [1], "must be a list of 2, got [1]"),
        (dict[str, int], {"a": {}}, '"a" must be a whole number, got {}'),
        (dict[str, list[int]], {"a": [1, None]}, '"a[1]" must be a whole number, got None'),
        (Tree, [], "must be an object, got []"),
        (Tree, ["oak"], "must be an object, got ['oak']"),
        (Tree, {}, '"kind" is missing'),
        (Tree, tree(kind=True), "\"kind\" must be 'oak' or 'fir' or 1, got True"),
        (Tree, tree(leaves=None), '"leaves" must be a list, got None'),
        (Tree, tree(leaves=[["a", 1], ["b"]]), '"leaves[1].weight" is missing'),
        (Tree, tree(leaves=[["a", "1"]]), "\"leaves[0].weight\" must be a number, got '1'"),
        (Tree, tree(leaves=[["a", 1, "", 2]]), '"leaves[0]" must be a list of 3, got ['),
        (Tree, tree(leaves=[5]), '"leaves[0]" must be a list of 3, got 5'),
        (Tree, tree(pair=[0, 1]), '"pair[1]" must be a text, got 1'),
        (Tree, tree(extra={"x": "y"}), "\"extra.x\" must be a number, got 'y'"),
        (Tree, tree(loss="low"), "\"loss\" must be a number, got 'low'"),
        (list[Tree], [tree(size=13)], '"[0]" is refused: thirteen is no size'),
        (list[Tree | None], [tree(size="x")], '"[0].size" must be a whole number or null'),
    ],
)
def test_a_value_that_is_refused_names_its_place(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        decode(kind, value)
    assert str(caught.value).startswith(message)
    with pytest.raises(SchemaError) as caught:
        decode(kind, value, at="file")
    assert str(caught.value).startswith('"file')


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 3, 3.0),
        (Any, {"a": [math.nan]}, {"a": [math.nan]}),
        (tuple[int, ...], [1, 2], (1, 2)),
        (list, [1, "a"], [1, "a"]),
        (dict, {"a": 1}, {"a": 1}),
        (Leaf, ["a", 1], Leaf("a", 1.0)),
        (Leaf, {"name": "a", "weight": 1, "new": 5}, Leaf("a", 1.0)),
        (int | None, None, None),
    ],
)
def test_a_value_that_fits_is_read(kind: Any, value: Any, expected: Any) -> None:
    decoded = decode(kind, value)
    assert decoded == expected
    assert type(decoded) is type(expected)


def test_a_long_value_is_shortened_in_the_message() -> None:
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    for value in ("x" * 10_000, list(range(10_000)), {"a": "y" * 10_000}, nested):
        with pytest.raises(SchemaError) as caught:
            decode(int, value)
        assert len(str(caught.value)) < 300
