"""What a language model reads of an example: a template with its text, and words for labels."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import json
from typing import Any

from optuna_llm_catalyst.prompt_tuning.data import Example


#: The words of each label.
Verbalizers = Mapping[str, Sequence[str]]


def checked(template: str, *fields: str) -> str:
    """The template, if it has each of these fields once, at most one ``{text_pair}`` and no other.

    Raises:
        ValueError: If it has not.
    """
    named = [f"{{{field}}}" for field in fields]
    if any(template.count(name) != 1 for name in named) or template.count("{text_pair}") > 1:
        raise ValueError(
            f"`template` must have {' and '.join(named)} and may have {{text_pair}}, each once, "
            f"got {template!r}."
        )
    try:
        template.format(**dict.fromkeys((*fields, "text_pair"), ""))
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`template` may have {', '.join(named)} and {{text_pair}} only, got {template!r}."
        ) from error
    return template


def own_words(labels: Sequence[str]) -> dict[str, list[str]]:
    """The words that stand for labels unless others are given: their names."""
    return {label: [label.replace("_", " ")] for label in labels}


def words_of(labels: Sequence[str], verbalizers: Verbalizers | str | None) -> dict[str, list[str]]:
    """The words of each label, in the order of the labels.

    Args:
        labels: Label names.
        verbalizers: Words of each label, or that as JSON; by default the labels' own names.

    Raises:
        ValueError: If a label has no words.
    """
    given = json.loads(verbalizers) if isinstance(verbalizers, str) else verbalizers
    words = given or own_words(labels)
    if words.keys() != set(labels) or not all(words.values()):
        raise ValueError(
            f"`verbalizers` must have words for each of {', '.join(labels)}, got {dict(words)!r}."
        )
    return {label: list(words[label]) for label in labels}


def filled(template: str, example: Example, tokenizer: Any, room: int, **fields: str) -> str:
    """The template with an example in it.

    Args:
        template: The template.
        example: The example.
        tokenizer: A fast tokenizer.
        room: Tokens at which its text is cut; the texts of a pair have half of it each.
        fields: What stands for the template's other fields.

    Raises:
        ValueError: If it is a pair and the template has one text, or the other way round.
    """
    pair = example.text_pair
    if ("{text_pair}" in template) != (pair is not None):
        has = "has no second text" if pair is None else "has a second text"
        raise ValueError(
            f"The example {example.text[:60]!r} {has}, which does not fit the template "
            f"{template!r}: {{text_pair}} stands for it there."
        )
    room = room if pair is None else room // 2
    text, text_pair = (_cut(some, tokenizer, room) for some in (example.text, pair or ""))
    return template.format(text=text, text_pair=text_pair, **fields)


def _cut(text: str, tokenizer: Any, n_tokens: int) -> str:
    """The start of a text, of so many tokens at most.

    It ends where the first token that has no room starts: of a character that is several tokens
    nothing stays if not all of it has room.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in found["offset_mapping"]]
    return text if len(starts) <= n_tokens else text[: starts[n_tokens]].rstrip()
