"""The words of a tokenizer, whichever kind of tokenizer it is."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Sized
from functools import cached_property
from typing import Any
from typing import Protocol


_MIN_WORD_LENGTH = 3


class Tokenizer(Protocol):
    """What a vocabulary needs of a tokenizer; any Hugging Face tokenizer has it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Any) -> Any: ...


class Vocabulary:
    """The tokens of a tokenizer and those of them that are whole words.

    Args:
        tokenizer: A Hugging Face tokenizer, or any other :class:`Tokenizer`.
        size: Number of token ids. Default: ``len(tokenizer)``, else ``tokenizer.vocab_size``.
    """

    def __init__(self, tokenizer: Tokenizer, size: int | None = None) -> None:
        self.tokenizer: Any = tokenizer
        if size is None:
            size = getattr(tokenizer, "vocab_size", None)
            if isinstance(tokenizer, Sized):
                size = len(tokenizer)
        if size is None:
            raise ValueError(
                f"{type(tokenizer).__name__} tells no vocabulary size by `len()` or `vocab_size`; "
                "pass `vocab_size=`."
            )
        if size < 2:
            raise ValueError(f"`vocab_size` must be at least 2, got {size}.")
        self.size: int = size
        special_ids = getattr(tokenizer, "all_special_ids", None)
        self._is_hugging_face = special_ids is not None
        self._special_ids = frozenset(special_ids or ())

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, none of them special."""
        return self._encode_each([text])[0]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(token_ids)))

    @cached_property
    def whole_words(self) -> dict[int, str]:
        """Token ids that are whole words in running text, with the word, ordered by token id.

        The order does not depend on the tokenizer's dict order, which changes from process to
        process, so a seeded draw from it is repeatable.
        """
        letters = {
            token_id: word
            for token_id, text in enumerate(self._decode_each(range(self.size)))
            if (word := text.strip()).isalpha() and token_id not in self._special_ids
        }
        # Multilingual vocabularies are full of fragments; a short or foreign one is a word where
        # there is nothing else, as in a Chinese vocabulary.
        words = {
            token_id: word
            for token_id, word in letters.items()
            if word.isascii() and len(word) >= _MIN_WORD_LENGTH
        } or letters
        # A word counts when it is one token behind a space: this drops the pieces of a BPE.
        encoded = self._encode_each([f"{word} {word}" for word in words.values()])
        return {
            token_id: word
            for (token_id, word), ids in zip(words.items(), encoded, strict=True)
            if ids and ids[-1] == token_id
        }

    @cached_property
    def word_ids(self) -> dict[str, int]:
        """The whole words with their token ids; of two ids of one word, the lower."""
        return {word: token_id for token_id, word in reversed(self.whole_words.items())}

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The whole words, ordered by token id.

        Raises:
            ValueError: If there are none.
        """
        if not self.whole_words:
            raise ValueError("The tokenizer's vocabulary has no whole words to draw from.")
        return tuple(self.whole_words.values())

    def _encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self._is_hugging_face:
            return [list(self.tokenizer.encode(text)) for text in texts]
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # A text that spells out "[SEP]" or "</s>" would smuggle a special token in.
        return [[i for i in row if i not in self._special_ids] for row in rows]

    def _decode_each(self, token_ids: Iterable[int]) -> list[str]:
        if not self._is_hugging_face:
            return [self.decode([i]) for i in token_ids]
        return [str(text) for text in self.tokenizer.batch_decode([[i] for i in token_ids])]
