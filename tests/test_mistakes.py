from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst.mistakes import Confusion
from optuna_llm_catalyst.mistakes import MisreadText
from optuna_llm_catalyst.mistakes import Mistakes


LABELS = ("food", "tool", "wild_animal")
LABEL = st.sampled_from(LABELS)
#: Examples as (text, true label, predicted label).
EXAMPLES = st.lists(st.tuples(st.text(max_size=9), LABEL, LABEL), max_size=30)

Example = tuple[str, str, str]


def of(examples: list[Example], *, shared: bool = True, **limits: int) -> Mistakes:
    texts, labels, predicted = (
        [list(column) for column in zip(*examples, strict=True)] if examples else ([], [], [])
    )
    shown = [(text, None) for text in texts] if shared else []
    return Mistakes.of(labels, predicted, shown, **limits)


@given(examples=EXAMPLES)
def test_the_counts_are_those_of_the_slow_obvious_way(examples: list[Example]) -> None:
    mistakes = of(examples)
    errors = [(label, predicted) for _, label, predicted in examples if label != predicted]
    assert sum(c.count for c in mistakes.confusions) == len(errors)
    assert {(c.label, c.predicted): c.count for c in mistakes.confusions} == Counter(errors)
    for c in mistakes.confusions:
        assert c.label != c.predicted
        assert c.total == sum(label == c.label for _, label, _ in examples)
        assert 1 <= c.count <= c.total
    counts = [c.count for c in mistakes.confusions]
    assert counts == sorted(counts, reverse=True)


@given(examples=EXAMPLES, n=st.integers(0, 8))
def test_the_most_frequent_confusions_are_kept(examples: list[Example], n: int) -> None:
    everything = of(examples).confusions
    assert of(examples, max_confusions=n).confusions == everything[:n]


@given(examples=EXAMPLES, data=st.data())
def test_the_order_of_examples_does_not_change_the_confusions(
    examples: list[Example], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(examples))
    assert of(list(shuffled)).confusions == of(examples).confusions


@given(examples=EXAMPLES)
def test_there_are_texts_only_where_they_are_given(examples: list[Example]) -> None:
    silent = of(examples, shared=False)
    assert silent.texts == ()
    assert silent.confusions == of(examples).confusions


@given(examples=EXAMPLES, n=st.integers(0, 8))
def test_a_text_is_one_of_the_errors_and_kept_once(examples: list[Example], n: int) -> None:
    kept = [(t.text, t.label, t.predicted) for t in of(examples, max_texts=n).texts]
    errors = Counter(example for example in examples if example[1] != example[2])
    assert len(kept) == min(n, errors.total())
    assert Counter(kept) <= errors


@given(examples=EXAMPLES, n=st.integers(0, 8))
def test_one_of_each_confusion_comes_first(examples: list[Example], n: int) -> None:
    mistakes = of(examples, max_texts=n)
    pairs = [(t.label, t.predicted) for t in mistakes.texts]
    left = {(c.label, c.predicted): c.count for c in mistakes.confusions}
    # Round by round: who has a text left gives one, the most frequent confusion first.
    expected = []
    while left:
        expected += list(left)
        left = {pair: count - 1 for pair, count in left.items() if count > 1}
    assert pairs == expected[:n]


@given(examples=EXAMPLES)
def test_within_a_confusion_the_first_texts_are_kept(examples: list[Example]) -> None:
    mistakes = of(examples, max_texts=5)
    for confusion in mistakes.confusions:
        pair = (confusion.label, confusion.predicted)
        kept = [t.text for t in mistakes.texts if (t.label, t.predicted) == pair]
        given_texts = [text for text, *labels in examples if tuple(labels) == pair]
        assert kept == given_texts[: len(kept)]


def test_by_default_five_texts_and_twenty_confusions_are_kept() -> None:
    labels = [str(i) for i in range(30)]
    mistakes = Mistakes.of(labels, labels[::-1], [(label, None) for label in labels])
    assert len(mistakes.confusions) == 20
    assert len(mistakes.texts) == 5


def test_equal_counts_are_in_the_order_of_their_labels() -> None:
    mistakes = Mistakes.of(["b", "a", "a", "c"], ["a", "c", "b", "a"])
    assert [(c.label, c.predicted) for c in mistakes.confusions] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "a"),
        ("c", "a"),
    ]


@pytest.mark.parametrize("n", [0, 499, 500, 501, 5_000])
def test_a_long_text_is_cut(n: int) -> None:
    (kept,) = Mistakes.of(["a"], ["b"], [("z" * n, "y" * n)]).texts
    assert kept == MisreadText("z" * min(n, 500), "a", "b", "y" * min(n, 500))


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [([], []), (["a", "b"], ["a", "b"])],
    ids=["no examples", "no errors"],
)
def test_without_errors_there_are_no_mistakes(labels: list[str], predicted: list[str]) -> None:
    assert Mistakes.of(labels, predicted, [(label, None) for label in labels]) == Mistakes()


def test_predictions_of_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Mistakes.of(["a", "b"], ["a"])


@pytest.mark.parametrize("n_texts", [1, 3])
def test_texts_of_other_examples_are_refused(n_texts: int) -> None:
    with pytest.raises(ValueError, match="argument"):
        Mistakes.of(["a", "b"], ["b", "a"], [("text", None)] * n_texts)


NAMES = st.text(max_size=5)
ANY_MISTAKES = st.builds(
    Mistakes,
    st.lists(st.builds(Confusion, NAMES, NAMES, st.integers(), st.integers())).map(tuple),
    st.lists(st.builds(MisreadText, st.text(), NAMES, NAMES, st.none() | st.text())).map(tuple),
)


def test_the_form_on_a_trial_is_this() -> None:
    mistakes = Mistakes.of(["food", "food"], ["tool", "food"], [("soup", "hot"), ("rice", None)])
    assert mistakes.to_json() == {
        "confusions": [["food", "tool", 1, 2]],
        "texts": [["soup", "food", "tool", "hot"]],
    }
