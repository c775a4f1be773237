from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.proposers.templates import fill
from optuna_llm_catalyst.proposers.templates import filled
from optuna_llm_catalyst.proposers.templates import read
from optuna_llm_catalyst.proposers.templates import TaskWords
from tests.tokenizer_zoo import word_piece
from tests.tokenizer_zoo import ZOO
from tests.toy_stage import word_space


TOPICS = ("World", "Sports")


PAIR = (("World", "Sports"), ("Sports", "World"))


@pytest.mark.parametrize(
    ("description", "labels", "words"),
    [
        ("Sort news by their topic.", TOPICS, (("news article",), "topic")),
        (
            "Sort questions by the kind of answer they ask for.",
            TOPICS,
            (("question",), "kind of answer", ("answer",)),
        ),
        (
            "Tell whether a sentence from a film review is positive or negative.",
            ("negative", "positive"),
            (("sentence", "film review"), "sentiment"),
        ),
        (
            "Tell whether a sentence about a film is an opinion or tells its plot.",
            ("subjective", "objective"),
            (("sentence",), "opinion", ("film", "plot")),
        ),
        (
            "Sort messages to an online shop by what the customer wants.",
            ("billing", "return"),
            (("message",), "label", ("shop", "customer")),
        ),
        ("Classify the sentiment of tweets.", TOPICS, (("tweet",), "sentiment")),
        ("Is this e-mail spam?", ("spam", "ham"), (("email",), "label")),
        ("Intents of banking queries", TOPICS, (("banking query",), "intent")),
        ("Classify texts (ag_news).", TOPICS, (("news article",), "label")),
        (
            "Sort satellite images by the kind of land.",
            TOPICS,
            (("satellite image",), "kind of land", ("land",)),
        ),
        # A text about images is a text.
        ("Sort reviews of photo printers.", TOPICS, (("review",), "label", ("printer",))),
        ("Classify texts (trec).", TOPICS, (("text",), "label", (), PAIR)),
        ("Which of the stories?", TOPICS, (("story",), "label")),
        ("", TOPICS, (("text",), "label", (), PAIR)),
        ("", ("Good", "bad"), (("text",), "sentiment", (), (("Good", "bad"), ("bad", "Good")))),
        ("", ("one_label",), (("text",), "label")),
        ("", list("abcdef"), (("text",), "label", (), tuple(zip("abcd", "bcde", strict=True)))),
        ("42 %&/ _", (), (("text",), "label")),
    ],
)
def test_a_description_is_read(
    description: str, labels: tuple[str, ...], words: tuple[Any, ...]
) -> None:
    assert read(description, labels) == TaskWords(*words)


def test_templates_are_filled_with_the_words_of_the_task() -> None:
    texts = filled(TaskWords(("question",), "kind of answer", ("answer", "topic")))
    assert len(set(texts)) == len(texts)
    for text in (
        "this question is about",
        "the kind of answer of this question is",
        "the answer to this question is a",
        "in this question the topic is",
    ):
        assert text in texts
    assert all("question" in text for text in texts)
    plain = filled(TaskWords(("message",), "label", ()))
    assert "this message is about" in plain
    assert not any("answer to" in text for text in plain)


def test_images_have_templates_of_their_own() -> None:
    texts = filled(read("Sort satellite images by the kind of land.", TOPICS))
    assert {"a photo of a", "this satellite image shows a"} <= {*texts}
    assert not any("about" in text or "reader" in text for text in texts)
    assert len(set(texts)) == len(texts)


def test_labels_say_what_a_task_is_whose_description_does_not() -> None:
    texts = filled(read("", ["not_spam", "spam {x}"]))
    for text in (
        "this text is about",
        "is this text not spam or spam {x}?",
        "between spam {x} and not spam this text is",
        "unlike not spam this text is about",
    ):
        assert text in texts


def test_a_task_of_two_kinds_of_text_has_templates_of_both() -> None:
    texts = filled(TaskWords(("sentence", "film review"), "sentiment", ()))
    assert {"this sentence is about", "this film review is about"} <= {*texts}


def test_eight_tokens_hold_more_templates_than_the_first_stages_need() -> None:
    space = PromptSpace(word_piece(), 8)
    for description in ("Sort news by their topic.", "Classify texts.", ""):
        assert len(fill(space, description, TOPICS)) >= 12


def letters(text: str) -> str:
    return "".join(text.casefold().split())


@settings(max_examples=30)
@given(
    kind=st.sampled_from([*ZOO]),
    description=st.text(max_size=40) | st.sampled_from(["Sort film reviews.", "Sort questions."]),
    labels=st.lists(st.text(max_size=9), max_size=3),
    length=st.integers(1, 12),
)
def test_every_template_is_a_prompt_of_whole_words(
    kind: str, description: str, labels: list[str], length: int
) -> None:
    space = PromptSpace(ZOO[kind](), length)
    prompts = fill(space, description, labels)
    assert prompts == fill(space, description, labels)
    assert len({prompt.token_ids for prompt in prompts}) == len(prompts)
    if not description.strip() and not labels:
        assert prompts == ()
    texts = [text.split() for text in filled(read(description, labels))]
    endings = {letters(" ".join(words[i:])) for words in texts for i in range(len(words))}
    for prompt in prompts:
        assert prompt.n_truncated == 0
        assert space.from_text(prompt.text) == prompt
        # What was cut to fit lacks words at its beginning.
        n_used = length - prompt.n_padding
        assert letters(space.vocabulary.decode(prompt.token_ids[:n_used])) in endings


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (8, "the main subject of the question is"),
        (5, "subject of the question is"),
        (3, "the question is"),
        (2, "question is"),
    ],
)
def test_a_template_that_is_too_long_loses_its_beginning(length: int, expected: str) -> None:
    space = PromptSpace(word_piece(), length)
    texts = [space.without_padding(p) for p in fill(space, "Sort questions.", TOPICS)]
    assert expected in texts
    assert all("question" in text for text in texts)


def test_templates_are_cut_only_where_too_few_fit() -> None:
    space = PromptSpace(word_piece(), 7)
    texts = filled(read("Sort questions.", TOPICS))
    shown = [
        space.vocabulary.decode(p.token_ids[: 7 - p.n_padding])
        for p in fill(space, "Sort questions.", TOPICS)
    ]
    assert 8 <= len(shown) < len(texts)
    assert {*shown} <= {*texts}


def test_a_vocabulary_that_lacks_words_of_a_template_does_without_it() -> None:
    words = "a this question is about the label of".split()
    space = word_space(8, words)
    texts = [p.text for p in fill(space, "Sort questions.", TOPICS)]
    assert "this question is about a a a a" in texts
    assert "the label of this question is a a" in texts
    assert not any("subject" in text or "main" in text for text in texts)
    assert fill(word_space(8), "Sort questions.", TOPICS) == ()
