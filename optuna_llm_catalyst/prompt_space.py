"""A prompt as ``L`` integer parameters of an Optuna study, and back to text."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from numbers import Integral
from operator import itemgetter
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import BaseTrial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import StudyMismatchError
from optuna_llm_catalyst.vocabulary import Tokenizer
from optuna_llm_catalyst.vocabulary import Vocabulary


#: What the names of this package's parameters start with.
NAME_PREFIX = "prompt["
#: Each virtual token is a parameter of every trial, and few models read more than 512 tokens.
MAX_VIRTUAL_TOKENS = 1_000
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


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
    the dashboard understand. Token ids have no order, so samplers that model integers as numbers
    (TPE, GP, CMA-ES) run on this space but learn little from it.

    Args:
        tokenizer: A Hugging Face tokenizer, or anything with ``encode(text) -> list[int]``
            (without special tokens) and ``decode(token_ids) -> str``.
        num_virtual_tokens: Length ``L`` of the prompt in tokens, constant within a study.
        vocab_size: Number of token ids. Default: ``len(tokenizer)``, else
            ``tokenizer.vocab_size``.
        padding: The word that fills a prompt shorter than ``L`` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_virtual_tokens: int = 8,
        *,
        vocab_size: int | None = None,
        padding: str = "a",
    ) -> None:
        if not 1 <= num_virtual_tokens <= MAX_VIRTUAL_TOKENS:
            raise ValueError(
                f"`num_virtual_tokens` must be from 1 to {MAX_VIRTUAL_TOKENS}, got "
                f"{num_virtual_tokens}."
            )
        self.tokenizer: Any = tokenizer
        self.vocabulary = Vocabulary(tokenizer, vocab_size)
        self.vocab_size = self.vocabulary.size
        self.num_virtual_tokens = num_virtual_tokens
        # Samplers sort names lexicographically: zero-padding keeps that the order of positions.
        width = len(str(num_virtual_tokens - 1))
        self.param_names = tuple(f"{NAME_PREFIX}{i:0{width}}]" for i in range(num_virtual_tokens))
        self._values_of = itemgetter(*self.param_names)
        # Within running text a word can have another id than at its start ("Ġa" against "a").
        padding_ids = self.vocabulary.encode(f"{padding} {padding}")
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

    @property
    def whole_words(self) -> dict[int, str]:
        """Token ids that are whole words in running text, with the word, ordered by token id."""
        return self.vocabulary.whole_words

    @property
    def word_ids(self) -> dict[str, int]:
        """The whole words with their token ids; of two ids of one word, the lower."""
        return self.vocabulary.word_ids

    @property
    def words(self) -> tuple[str, ...]:
        """The whole words, ordered by token id: what random prompts are drawn from."""
        return self.vocabulary.words

    def suggest(self, trial: BaseTrial) -> RestartPrompt:
        """Suggests the restart prompt of a trial and sets its user attribute ``prompt``.

        The attribute is the prompt's text without padding; one of this name that the user set
        stays. A trial of which all tokens were enqueued also gets ``origin``: ``enqueued``.

        Raises:
            ValueError: If a token id that was enqueued or fixed is outside the space.
        """
        high = self.vocab_size - 1
        params = {name: trial.suggest_int(name, 0, high) for name in self.param_names}
        prompt = self.from_token_ids(list(self.fixed_ids(trial.number, params).values()))
        records.see_user_attrs(trial)
        # Users set user attributes of their own: the study is checked by a copy.
        known, shown = records.load(trial, "prompt", str), trial.user_attrs.get("prompt")
        text = self.without_padding(prompt)
        # Ours is what an earlier suggestion recorded, with or without its padding.
        is_ours = isinstance(shown, str) and known is not None and known.startswith(shown)
        if shown != text and (shown is None or is_ours):
            trial.set_user_attr("prompt", text)
        if known != prompt.text:
            records.save(trial, "prompt", prompt.text)
        if "origin" not in trial.user_attrs and self.find(records.enqueued_params(trial)):
            trial.set_user_attr("origin", "enqueued")
        return prompt

    def enqueue(self, study: optuna.Study, text: str, **params: Any) -> RestartPrompt:
        """Enqueues a human's prompt as the next trial, and returns it as it will be used.

        Args:
            study: The study.
            text: The prompt; padded to the space's length, or cut with a warning.
            params: Values of other parameters of the trial, if some shall be fixed as well.
        """
        prompt = self.from_text(text, warn=True)
        study.enqueue_trial(
            {**self.to_params(prompt), **params},
            user_attrs={"prompt": self.without_padding(prompt), "origin": "enqueued"},
        )
        return prompt

    def fixed_ids(self, trial_number: int, params: Mapping[str, Any]) -> dict[int, int]:
        """The token ids among parameters of a trial, by position.

        Raises:
            ValueError: If one of them is no token id of this space.
        """
        fixed = {i: params[name] for i, name in enumerate(self.param_names) if name in params}
        for i, value in fixed.items():
            if not self._is_token_id(value):
                raise ValueError(
                    f"Trial {trial_number}: {self.param_names[i]} is {value!r}, which is no token "
                    f"id: it must be a whole number in [0, {self.vocab_size - 1}]. Prompts are "
                    "enqueued best by `PromptSpace.enqueue(study, text)`."
                )
        return {i: int(value) for i, value in fixed.items()}

    def is_prompt(self, token_ids: Sequence[Any]) -> bool:
        """Whether these are the token ids of a prompt of this space."""
        return len(token_ids) == self.num_virtual_tokens and all(map(self._is_token_id, token_ids))

    def find(self, params: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The token ids of the prompt among parameters; None if they have none in this range.

        It is called for each trial of a study, and does not check that the ids are whole.
        """
        try:
            values = self._values_of(params)
            token_ids: tuple[int, ...] = values if self.num_virtual_tokens > 1 else (values,)
            # Optuna lets anything be enqueued, and runs it.
            return token_ids if 0 <= min(token_ids) and max(token_ids) < self.vocab_size else None
        except (KeyError, TypeError):
            return None

    def decode(self, trial_or_params: BaseTrial | Mapping[str, Any]) -> RestartPrompt:
        """Returns the prompt of a trial, or of a dict of parameters.

        Raises:
            StudyMismatchError: If a parameter of this space is missing.
        """
        source = trial_or_params
        params = source if isinstance(source, Mapping) else source.params
        missing = [name for name in self.param_names if name not in params]
        if missing:
            raise StudyMismatchError(
                f"The parameters {missing} are missing: was the study made with another "
                f"`num_virtual_tokens` than {self.num_virtual_tokens}?"
            )
        return self.from_token_ids([params[name] for name in self.param_names])

    def from_text(self, text: str, *, warn: bool = False) -> RestartPrompt:
        """Encodes a text to exactly ``num_virtual_tokens`` tokens, none of them special.

        A longer text is cut, which ``warn`` logs, a shorter one padded. The result says by how
        much and has the text that is left: ``from_text(prompt.text)`` is ``prompt`` again.

        Raises:
            ValueError: If no token of the vocabulary can express the text.
        """
        token_ids = self.vocabulary.encode(text)
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
            again = self._fit(self.vocabulary.encode(self.vocabulary.decode(fitted)))
            if again == fitted:
                break
            fitted = again
        kept = self.vocabulary.decode(fitted)
        if warn and n_truncated:
            _logger.warning(
                f"The prompt {text!r} is {n_truncated} tokens too long. It is cut to {kept!r}."
            )
        return RestartPrompt(kept, tuple(fitted), n_truncated, n_padding)

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
        return RestartPrompt(self.vocabulary.decode(ids), ids)

    def with_tokens(self, prompt: RestartPrompt, fixed: Mapping[int, int]) -> RestartPrompt:
        """The prompt with other token ids at some positions."""
        ids = tuple(fixed.get(i, token_id) for i, token_id in enumerate(prompt.token_ids))
        if ids == prompt.token_ids:
            return prompt
        return replace(prompt, token_ids=ids, text=self.vocabulary.decode(ids))

    def n_used(self, token_ids: Sequence[int]) -> int:
        """Tokens before the padding at the end."""
        n = len(token_ids)
        while n > 0 and token_ids[n - 1] == self.padding_id:
            n -= 1
        return n

    def without_padding(self, prompt: RestartPrompt) -> str:
        """A prompt's text without the padding at its end, if there is anything else."""
        n = self.n_used(prompt.token_ids)
        is_padded = 0 < n < len(prompt.token_ids)
        return self.vocabulary.decode(prompt.token_ids[:n]) if is_padded else prompt.text

    def to_params(self, prompt: RestartPrompt) -> dict[str, int]:
        """The prompt as values of this space's parameters."""
        return dict(zip(self.param_names, prompt.token_ids, strict=True))

    def _is_token_id(self, value: Any) -> bool:
        return isinstance(value, Integral) and 0 <= int(value) < self.vocab_size

    def _fit(self, token_ids: Sequence[int]) -> list[int]:
        cut = list(token_ids[: self.num_virtual_tokens])
        return cut + [self.padding_id] * (self.num_virtual_tokens - len(cut))
