"""What a trained prompt or an ensemble gets wrong: labels taken for others, texts if allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

from optuna_llm_catalyst.schema import AnyFloat
from optuna_llm_catalyst.schema import encode
from optuna_llm_catalyst.schema import Row


_MAX_TEXT = 500


@dataclass(frozen=True)
class Confusion(Row):
    """How often examples of one label were taken for another.

    Attributes:
        label: The true label.
        predicted: The label that was given instead.
        count: How many examples.
        total: How many examples the true label has.
    """

    label: str
    predicted: str
    count: int
    total: int


@dataclass(frozen=True)
class MisreadText(Row):
    """An example that got a wrong label; a pair of texts if it has two."""

    text: str
    label: str
    predicted: str
    text_pair: str | None = None


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of a prompt, or of an ensemble, on the validation split.

    Attributes:
        confusions: Most frequent first.
        texts: Some of the examples; empty unless the user shares examples.
    """

    confusions: tuple[Confusion, ...] = ()
    texts: tuple[MisreadText, ...] = ()

    @staticmethod
    def of(
        labels: Sequence[str],
        predicted: Sequence[str],
        texts: Sequence[tuple[str, str | None]] = (),
        *,
        max_confusions: int = 20,
        max_texts: int = 5,
    ) -> Mistakes:
        """Counts the mistakes of predictions.

        Args:
            labels: The true label of each example.
            predicted: The predicted one.
            texts: The examples, each a text and its pair or None, if some may be kept.
            max_confusions: How many confusions to keep.
            max_texts: How many texts to keep, of different confusions first.
        """
        totals = Counter(labels)
        counts = Counter((a, b) for a, b in zip(labels, predicted, strict=True) if a != b)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        confusions = tuple(Confusion(a, b, n, totals[a]) for (a, b), n in ranked[:max_confusions])
        misread: dict[tuple[str, str], list[MisreadText]] = {pair: [] for pair, _ in ranked}
        for (text, pair), a, b in zip(texts, labels, predicted, strict=True) if texts else ():
            if a != b:
                cut = None if pair is None else pair[:_MAX_TEXT]
                misread[a, b].append(MisreadText(text[:_MAX_TEXT], a, b, cut))
        # One of each confusion, then a second of each, …
        rounds = [each[i] for i in range(max_texts) for each in misread.values() if i < len(each)]
        return Mistakes(confusions, tuple(rounds[:max_texts]))

    def to_json(self) -> dict[str, Any]:
        """A dict of strings, numbers and lists."""
        return dict(encode(self))


@dataclass(frozen=True)
class EnsembleRecord:
    """What the ensemble of a study's stages came to with the stage of a trial.

    Attributes:
        n_members: How many stages it has, this one included.
        loss: Its validation loss, in nats.
        accuracy: Its validation accuracy, in [0, 1].
        mistakes: What it gets wrong.
        value: What it comes to by what the study optimises; not a number if not recorded.
    """

    n_members: int
    loss: AnyFloat
    accuracy: float
    mistakes: Mistakes = Mistakes()
    value: AnyFloat = math.nan

    def to_json(self) -> dict[str, Any]:
        """A dict of strings, numbers and lists."""
        return dict(encode(self))
