"""What users hand over as texts: what is read, and what is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning.text_inputs import read_texts


SINGLE, PAIRS = ["one", "two  words"], [("one", "two"), ("three", "four")]

READ: dict[str, tuple[Any, list[Any]]] = {
    "a list": (SINGLE, SINGLE),
    "a tuple": (tuple(SINGLE), SINGLE),
    "an array": (np.array(SINGLE), SINGLE),
    "an array of objects": (np.array(SINGLE, dtype=object), SINGLE),
    "a series": (pd.Series(SINGLE, index=[7, 9]), SINGLE),
    "a column": (pd.DataFrame({"text": SINGLE})["text"], SINGLE),
    "a generator": ((text for text in SINGLE), SINGLE),
    "nothing": ([], []),
    "an empty array": (np.array([]), []),
    "pairs": (PAIRS, PAIRS),
    "pairs as lists": ([list(pair) for pair in PAIRS], PAIRS),
    "pairs as rows of an array": (np.array(PAIRS), PAIRS),
    "pairs as rows of a frame": (pd.DataFrame(PAIRS).to_numpy(), PAIRS),
    "a series of pairs": (pd.Series(PAIRS), PAIRS),
}


@pytest.mark.parametrize("case", READ)
def test_texts_are_read(case: str) -> None:
    given, expected = READ[case]
    found = read_texts(given)
    assert [e.text if e.text_pair is None else (e.text, e.text_pair) for e in found] == expected
    assert all(type(example.text) is str for example in found)


REFUSED: dict[str, tuple[Any, str]] = {
    "one text": ("one", "`texts` is one text, 'one': put it into a list"),
    "bytes": (b"one", "`texts` is one text, b'one'"),
    "a frame": (
        pd.DataFrame({"text": SINGLE}),
        "of type DataFrame: .* one column, such as",
    ),
    "a dict": ({"text": "one"}, "`texts` is of type dict: give a list"),
    "a set": ({"one"}, "`texts` is of type set: give a list"),
    "a number": (3, "`texts` is 3, of type int: give a list"),
    "None": (None, "`texts` is None, of type NoneType: give a list"),
    "an array of no dimension": (np.array("one"), r"of type ndarray: give a list"),
    "numbers": (["one", 2], r"`texts\[1\]` is 2, of type int: give a text, or a pair"),
    "a missing text": (pd.Series(["one", None]), r"`texts\[1\]` is (None|nan), of type"),
    "bytes within": ([b"one"], r"`texts\[0\]` is b'one', of type bytes"),
    "an empty text": (["one", ""], r"`texts\[1\]` is empty"),
    "a blank text": ([" \n"], r"`texts\[0\]` is empty"),
    "an empty second text": ([("one", "")], r"`texts\[0\]` is empty"),
    "half a character": (["\ud83d"], r"`texts\[0\]` has half a character, '\\ud83d' at 0"),
    "three texts": ([("one", "two", "three")], r"`texts\[0\]` is \('one', 'two', 'three'\)"),
    "a list of one": ([["one"]], r"`texts\[0\]` is \['one'\], of type list"),
    "half a pair": ([("one", None)], r"`texts\[0\]` is \('one', None\), of type tuple"),
    "a cube": (np.array([[["one", "two"]] * 2]), r"`texts\[0\]` is array"),
    "a pair too many": (["one", ("one", "two")], r"`texts\[1\]` is a pair of texts, but single"),
    "a pair too few": ([*PAIRS, "one"], r"`texts\[2\]` is a single text, but pairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_by_its_place(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        read_texts(given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("given", "pairs"), [(PAIRS, False), (SINGLE, True)])
def test_what_a_classifier_does_not_read_is_refused(given: list[Any], pairs: bool) -> None:
    with pytest.raises(ValueError, match=r"`texts\[0\]` is a .*, but .* are read"):
        read_texts(given, pairs=pairs)
    assert len(read_texts(given, pairs=not pairs)) == 2
    assert read_texts([], pairs=pairs) == []


def test_a_long_text_is_not_told_in_full() -> None:
    with pytest.raises(ValueError, match="one text") as raised:
        read_texts("x" * 10_000)
    assert len(str(raised.value)) < 200
    assert read_texts(["x" * 10_000]) == [Example("x" * 10_000, 0)]
