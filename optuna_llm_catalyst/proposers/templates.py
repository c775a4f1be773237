"""First prompts without an LLM: templates, filled with what a task's description says. Pure.

Whole sentences that name the task's kind of text and break off where a label goes on. Where it was
measured, such sentences were about equally good starts, and better ones than random words. So they
need little of a description: what it calls a text and the labels, and a noun or two.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
import re

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt


#: Of different points of view: what a text is about, what a reader says of it, where it belongs.
_OF_TEXT = (
    "this {text} is about",
    "the {aspect} of this {text} is",
    "if you read the {text} it is",
    "the main subject of the {text} is",
    "we read this {text} and call it",
    "the label of this {text} is",
    "the reader of this {text} learns about",
    "the {text} has to do with",
    "what this {text} is about is the",
    "you can tell from this {text} that",
    "the category of the {text} is",
    "after reading this {text} one says it is",
    "the point of this {text} is the",
    "as its reader would say the {text} is",
    "this {text} would be filed under",
    "here is a {text} and it is",
    "the {text} that you read is",
)
_OF_IMAGE = (
    "a photo of a",
    "the {text} of the",
    "this {text} shows a",
    "a good {text} of the",
    "what you see in this {text} is a",
    "a close-up {text} of a",
    "the main thing in the {text} is the",
    "look at the {text} it is a",
    "here is one {text} of the",
    "the {aspect} in this {text} is",
)
_OF_QUESTION = ("the answer to this {text} is a", "who asks this {text} wants to know the")
_OF_NOUN = (
    "the {noun} of this {text} is",
    "this {text} about the {noun} is",
    "in this {text} the {noun} is",
)
#: Where the description does not say what the texts are, labels say what the task is.
_OF_LABELS = (
    "is this {text} {label} or {other}?",
    "between {label} and {other} this {text} is",
    "unlike {label} this {text} is about",
)

#: What descriptions call a text. "Text" is not among them: it says nothing, and is the default.
_TEXTS = frozenset(
    "abstract article claim comment complaint conversation dialogue document email essay headline "
    "letter message news note paper paragraph passage post question query quote report review "
    "sentence song statement story summary ticket title tweet utterance".split()
)
#: What they call an image, where there is no text.
_IMAGES = frozenset("drawing image painting photo photograph picture scan sketch".split())
#: What they call the labels.
_ASPECTS = frozenset(
    "attitude category class emotion feeling genre intent intention kind language mood opinion "
    "polarity quality rating sentiment stance style subject theme tone topic type".split()
)
_SENTIMENTS = frozenset("bad good negative neutral positive".split())
#: Words in front of a noun.
_DETERMINERS = frozenset("a an any each every her his its no of our some that the their".split())
#: Words that belong to no noun: they join, ask for an action, or tell what somebody does.
_OTHERS = _DETERMINERS | frozenset(
    "about according all and are as ask asked asks assign at be belong belongs between by can "
    "choose classify contain contains decide deals describe described describes detect determine "
    "do does express expressed expresses find for from given gives has have how identify if in "
    "into is it judge mention mentioned mentions need needs not on one or per predict pick "
    "recognise recognize say says shall short should sort task tell tells than them they this to "
    "two under want wanted wants was we were what when where whether which who whose why will "
    "with write writes written wrote you your".split()
)
_MAX_NOUNS = 2
_MAX_PAIRS = 4
#: As many whole templates are enough: only if fewer fit, longer ones are cut.
_ENOUGH = 8


@dataclass(frozen=True)
class TaskWords:
    """What a description calls things.

    Attributes:
        texts: A text, such as "question" or "film review", or an image; "text" if it does not say.
        aspect: What the labels are of it, such as "topic".
        nouns: Others, such as "answer".
        pairs: Labels and others of them, where the description does not say what a text is.
    """

    texts: tuple[str, ...]
    aspect: str
    nouns: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


def fill(space: PromptSpace, description: str, labels: Sequence[str]) -> tuple[RestartPrompt, ...]:
    """The templates of a task as distinct prompts; none if nothing is known of the task.

    What is too long for the space loses words at its beginning, if too few templates fit whole.
    """
    if not description.strip() and not labels:
        return ()
    words = read(description, labels)
    texts = filled(words)
    whole = [prompt for text in texts if (prompt := _whole(space, text))]
    cut = [_ending(space, text, words) for text in texts if len(whole) < _ENOUGH]
    return tuple(dict.fromkeys([*whole, *filter(None, cut)]))


def filled(words: TaskWords) -> list[str]:
    """The templates with the words of a task, distinct."""
    found: dict[str, None] = {}
    if words.texts[0].endswith(tuple(_IMAGES)):
        pairs = [(template, text) for template in _OF_IMAGE for text in words.texts]
        return list(dict.fromkeys(t.format(text=text, aspect=words.aspect) for t, text in pairs))
    for template in (*_OF_TEXT, *_OF_QUESTION):
        for text in words.texts:
            if template in _OF_TEXT or text.endswith("question"):
                found[template.format(text=text, aspect=words.aspect)] = None
    for noun in words.nouns:
        for template in _OF_NOUN:
            found[template.format(text=words.texts[0], noun=noun)] = None
    for label, other in words.pairs:
        for template in _OF_LABELS:
            found[template.format(text=words.texts[0], label=label, other=other)] = None
    return list(found)


def read(description: str, labels: Sequence[str]) -> TaskWords:
    """The words of a description that templates need."""
    plain = description.casefold().replace("e-mail", "email")
    phrases = [part.split() for part in re.split(r"[^\w\s]|[\d_]", plain)]
    of_texts, of_images = (
        dict.fromkeys(text for phrase in phrases for text in _named(phrase, kinds))
        for kinds in (_TEXTS, _IMAGES)
    )
    texts = of_texts or of_images
    aspects = [aspect for phrase in phrases for aspect in _aspects(phrase)]
    nouns = dict.fromkeys(noun for phrase in phrases for noun in _nouns(phrase))
    names = [one_line(label.replace("_", " ")) for label in labels]
    is_sentiment = len(_SENTIMENTS.intersection(map(str.casefold, names))) > 1
    pairs = [*zip(names, [*names[1:], *names[:1]], strict=True)] if len(names) > 1 else []
    return TaskWords(
        tuple(texts) or ("text",),
        next(iter(aspects), "sentiment" if is_sentiment else "label"),
        tuple(nouns)[:_MAX_NOUNS],
        () if texts else tuple(pairs[:_MAX_PAIRS]),
    )


def _named(phrase: Sequence[str], kinds: Collection[str]) -> Iterator[str]:
    """What of some kinds a phrase names, each with the word before it if that belongs to it."""
    for i, word in enumerate(phrase):
        kind = _singular(word)
        if kind not in kinds:
            continue
        # "News" has no singular: "a news article".
        name = "news article" if kind == "news" else kind
        before = phrase[i - 1] if i else ""
        belongs = before and before not in _OTHERS and _singular(before) not in _ASPECTS
        yield f"{before} {name}" if belongs and before not in name else name


def _aspects(phrase: Sequence[str]) -> Iterator[str]:
    """What a phrase calls the labels: "topic", "kind of answer"."""
    for i, word in enumerate(phrase):
        aspect, behind = _singular(word), phrase[i + 1 : i + 3]
        if aspect in _ASPECTS:
            has_more = aspect in ("kind", "type") and behind[:1] == ["of"] and len(behind) == 2
            yield f"{aspect} of {_singular(behind[1])}" if has_more else aspect


def _nouns(phrase: Sequence[str]) -> Iterator[str]:
    """Nouns of a phrase that are neither texts nor aspects: the last word behind a determiner."""
    for i, word in enumerate(phrase):
        if word not in _DETERMINERS:
            continue
        run: list[str] = []
        for following in phrase[i + 1 : i + 4]:
            if following in _OTHERS:
                break
            run.append(following)
        noun = _singular(run[-1]) if run else ""
        if noun and noun != "text" and noun not in _TEXTS | _ASPECTS:
            yield noun


def _singular(word: str) -> str:
    if word in _TEXTS or word.endswith(("ss", "us", "is")):
        return word
    return re.sub("ies$", "y", word) if word.endswith("ies") else word.removesuffix("s")


def _ending(space: PromptSpace, text: str, words: TaskWords) -> RestartPrompt | None:
    """The longest ending of a text that fits and still says what the task's texts are."""
    names = {name.split()[-1] for name in words.texts}
    left = text.split()
    while not names.isdisjoint(left):
        if prompt := _whole(space, " ".join(left)):
            return prompt
        left = left[1:]
    return None


def _whole(space: PromptSpace, text: str) -> RestartPrompt | None:
    """The prompt of a text, if it fits and the tokenizer loses nothing of it."""
    try:
        prompt = space.from_text(text)
    except ValueError:
        return None
    n_used = space.num_virtual_tokens - prompt.n_padding
    kept = space.vocabulary.decode(prompt.token_ids[:n_used])
    return prompt if _letters(kept) == _letters(text) else None


def _letters(text: str) -> str:
    """A text whatever a tokenizer does with case and blanks."""
    return "".join(text.casefold().split())
