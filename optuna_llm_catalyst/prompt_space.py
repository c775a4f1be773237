"""A prompt as ``L`` integer parameters of an Optuna study, and back to text.

Token ids are the truth, text stands beside them for people and for the LLM. Token ids have no
order, so samplers that model integers as numbers (TPE, GP, CMA-ES) run on this space but learn
little from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from typing import Any
from typing import Protocol
from typing import TYPE_CHECKING

from optuna.distributions import IntDistribution

from optuna_llm_catalyst.exceptions import StudyMismatchError


if TYPE_CHECKING:
    import optuna
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

    TrialOrParams = BaseTrial | Mapping[str, Any]

_MIN_WORD_LENGTH = 3
_NAME_PREFIX = "prompt["


class Tokenizer(Protocol):
    """What :class:`PromptSpace` needs of a tokenizer; any Hugging Face tokenizer has it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Any) -> Any: ...


@dataclass(frozen=True)
class RestartPrompt:
    """A prompt from which a stage starts.

    Attributes:
        text: The text really used, ``decode(token_ids)``.
        token_ids: The token ids, as many as the space has virtual tokens.
        n_truncated: Tokens of the original text that did not fit.
        n_padding: Padding tokens that were appended.
    """

    text: str
    token_ids: tuple[int, ...]
    n_truncated: int = field(default=0, compare=False)
    n_padding: int = field(default=0, compare=False)


class PromptSpace:
    """A search space of prompts: ``num_virtual_tokens`` integers ``prompt[0]``, ``prompt[1]``, …

    Each is an ``IntDistribution(0, vocab_size - 1)``, which every Optuna storage, sampler and
    the dashboard understand.

    Args:
        tokenizer:
            A Hugging Face tokenizer, or anything with ``encode(text) -> list[int]`` (without
            special tokens) and ``decode(token_ids) -> str``.
        num_virtual_tokens:
            Length ``L`` of the prompt in tokens, constant within a study.
        vocab_size:
            Number of token ids. Default: ``len(tokenizer)``, else ``tokenizer.vocab_size``.
        padding:
            The word that fills a prompt shorter than ``L`` tokens.

    Example:

        .. code-block:: python

            space = PromptSpace(tokenizer, num_virtual_tokens=8)
            trial = study.ask()
            prompt = space.suggest(trial)  # RestartPrompt(text=..., token_ids=...)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_virtual_tokens: int = 8,
        *,
        vocab_size: int | None = None,
        padding: str = "a",
    ) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"`num_virtual_tokens` must be at least 1, got {num_virtual_tokens}.")
        self.tokenizer = tokenizer
        self.num_virtual_tokens = num_virtual_tokens
        self.vocab_size = _vocab_size(tokenizer) if vocab_size is None else vocab_size
        if self.vocab_size < 2:
            raise ValueError(f"`vocab_size` must be at least 2, got {self.vocab_size}.")
        # Samplers sort names lexicographically: zero-padding keeps that the order of positions.
        width = len(str(num_virtual_tokens - 1))
        self.param_names = tuple(f"{_NAME_PREFIX}{i:0{width}}]" for i in range(num_virtual_tokens))
        # Within running text a word can have another id than at its start ("Ġa" against "a").
        padding_ids = self._encode(f"{padding} {padding}")
        if not padding_ids:
            raise ValueError(
                f"`padding` {padding!r} has no token in this tokenizer's vocabulary; "
                "pass a word that has one."
            )
        self.padding_id = padding_ids[-1]

    @property
    def search_space(self) -> dict[str, IntDistribution]:
        """The distributions by parameter name; a new dict at each access."""
        return {name: IntDistribution(0, self.vocab_size - 1) for name in self.param_names}

    @cached_property
    def whole_words(self) -> dict[int, str]:
        """Token ids that are whole words in running text, with the word, ordered by token id.

        The order does not depend on the tokenizer's dict order, which changes from process to
        process, so a seeded draw from it is repeatable.
        """
        special = self._special_ids
        texts = self._decode_each(range(self.vocab_size))
        letters = {
            token_id: word
            for token_id, text in enumerate(texts)
            if (word := text.strip()).isalpha() and token_id not in special
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
        """The whole words, ordered by token id: what random prompts are drawn from.

        Raises:
            ValueError: If the vocabulary has none.
        """
        if not self.whole_words:
            raise ValueError("The tokenizer's vocabulary has no whole words to draw from.")
        return tuple(self.whole_words.values())

    def suggest(self, trial: BaseTrial) -> RestartPrompt:
        """Suggests the restart prompt of a trial and sets its user attribute ``prompt``."""
        token_ids = [trial.suggest_int(name, 0, self.vocab_size - 1) for name in self.param_names]
        prompt = self.from_token_ids(token_ids)
        if trial.user_attrs.get("prompt") != prompt.text:
            trial.set_user_attr("prompt", prompt.text)
        return prompt

    def enqueue(self, study: optuna.Study, text: str, **params: Any) -> RestartPrompt:
        """Enqueues a human's prompt as the next trial.

        Args:
            study: The study.
            text: The prompt; cut or padded to the space's length.
            params: Values of other parameters of the trial, if some shall be fixed as well.

        Returns:
            The prompt as it will be used.
        """
        prompt = self.from_text(text)
        study.enqueue_trial(
            {**self.to_params(prompt), **params},
            user_attrs={"prompt": prompt.text, "origin": "enqueued"},
        )
        return prompt

    def decode(self, trial_or_params: TrialOrParams) -> RestartPrompt:
        """Returns the prompt of a trial, or of a dict of parameters.

        Raises:
            StudyMismatchError: If a parameter of this space is missing.
        """
        if isinstance(trial_or_params, Mapping):
            params: Mapping[str, Any] = trial_or_params
        else:
            params = trial_or_params.params
        missing = [name for name in self.param_names if name not in params]
        if missing:
            raise StudyMismatchError(
                f"The parameters {missing} are missing: was the study made with another "
                f"`num_virtual_tokens` than {self.num_virtual_tokens}?"
            )
        return self.from_token_ids([params[name] for name in self.param_names])

    def from_text(self, text: str) -> RestartPrompt:
        """Encodes a text to exactly ``num_virtual_tokens`` tokens, none of them special.

        A longer text is cut, a shorter one padded; the result says by how much and carries the
        text that is left, so that ``from_text(prompt.text)`` is ``prompt`` again.

        Raises:
            ValueError: If no token of the vocabulary can express the text.
        """
        token_ids = self._encode(text)
        if not token_ids:
            raise ValueError(
                f"The text {text[:80]!r} has no token in this tokenizer's vocabulary."
            )
        n_truncated = max(0, len(token_ids) - self.num_virtual_tokens)
        n_padding = max(0, self.num_virtual_tokens - len(token_ids))
        fitted = self._fit(token_ids)
        # A cut inside a word can leave pieces that re-encode differently, and some tokenizers lose
        # a blank each time: settle on a text that stands for its own ids.
        for _ in range(2 * self.num_virtual_tokens + 4):
            again = self._fit(self._encode(self._decode(fitted)))
            if again == fitted:
                break
            fitted = again
        return RestartPrompt(self._decode(fitted), tuple(fitted), n_truncated, n_padding)

    def from_token_ids(self, token_ids: Sequence[int]) -> RestartPrompt:
        """The prompt of exactly these token ids.

        Raises:
            ValueError: If their number or one of them is outside the space.
        """
        if len(token_ids) != self.num_virtual_tokens:
            raise ValueError(
                f"`token_ids` must have {self.num_virtual_tokens} ids, got {len(token_ids)}."
            )
        outside = [i for i in token_ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"`token_ids` must be in [0, {self.vocab_size}), got {outside}.")
        ids = tuple(int(i) for i in token_ids)
        return RestartPrompt(self._decode(ids), ids)

    def n_used(self, token_ids: Sequence[int]) -> int:
        """Tokens before the padding at the end."""
        n = len(token_ids)
        while n > 0 and token_ids[n - 1] == self.padding_id:
            n -= 1
        return n

    def without_padding(self, prompt: RestartPrompt) -> str:
        """A prompt's text without the padding at its end, if there is anything else."""
        n = self.n_used(prompt.token_ids)
        return self._decode(prompt.token_ids[:n]) if 0 < n < len(prompt.token_ids) else prompt.text

    def to_params(self, prompt: RestartPrompt) -> dict[str, int]:
        """The prompt as values of this space's parameters."""
        return dict(zip(self.param_names, prompt.token_ids, strict=True))

    def check(self, trials: Sequence[FrozenTrial]) -> None:
        """Checks that trials were made with this tokenizer and this number of virtual tokens.

        Raises:
            StudyMismatchError: If they were not. The message names the trial and the difference.
        """
        for trial in trials:
            names = [name for name in trial.distributions if name.startswith(_NAME_PREFIX)]
            # A trial that died between two suggestions has some of the names only.
            unfinished = not trial.state.is_finished() or trial.state.name == "FAIL"
            if names and not (unfinished or set(names) == set(self.param_names)):
                raise StudyMismatchError(
                    f"Trial {trial.number} has a prompt of {len(names)} virtual tokens, this "
                    f"space {self.num_virtual_tokens}. Use the same number, or a new study name."
                )
            sizes = {getattr(trial.distributions[name], "high", -1) + 1 for name in names}
            other_sizes = sizes - {self.vocab_size}
            if other_sizes:
                raise StudyMismatchError(
                    f"Trial {trial.number} was made with a vocabulary of {other_sizes.pop()} "
                    f"tokens, this tokenizer has {self.vocab_size}. Use the model of the study, "
                    "or a new study name."
                )
            text = trial.user_attrs.get("prompt")
            complete = set(self.param_names) <= set(trial.params)
            if text is not None and complete and self.decode(trial).text != text:
                raise StudyMismatchError(
                    f"Trial {trial.number} started from {text!r}, which this tokenizer reads as "
                    f"{self.decode(trial).text!r}. Use the model of the study, or a new study "
                    "name."
                )

    @property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(getattr(self.tokenizer, "all_special_ids", ()))

    @property
    def _is_hugging_face(self) -> bool:
        return hasattr(self.tokenizer, "all_special_ids")

    def _fit(self, token_ids: Sequence[int]) -> list[int]:
        cut = list(token_ids[: self.num_virtual_tokens])
        return cut + [self.padding_id] * (self.num_virtual_tokens - len(cut))

    def _encode(self, text: str) -> list[int]:
        return self._encode_each([text])[0]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids)))

    def _encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self._is_hugging_face:
            return [list(self.tokenizer.encode(text)) for text in texts]
        tokenizer: Any = self.tokenizer
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # A text that spells out "[SEP]" or "</s>" would smuggle a special token in.
        special = self._special_ids
        return [[i for i in row if i not in special] for row in rows]

    def _decode_each(self, token_ids: Sequence[int]) -> list[str]:
        if not self._is_hugging_face:
            return [self._decode([i]) for i in token_ids]
        tokenizer: Any = self.tokenizer
        return [str(text) for text in tokenizer.batch_decode([[i] for i in token_ids])]


def _vocab_size(tokenizer: Any) -> int:
    try:
        return len(tokenizer)
    except TypeError:
        pass
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int):
        return size
    raise ValueError(
        f"{type(tokenizer).__name__} tells no vocabulary size by `len()` or `vocab_size`; "
        "pass `vocab_size=`."
    )
