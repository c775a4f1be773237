"""What a trained prompt gets wrong: which labels it takes for which, and some texts if allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


_MAX_TEXT = 500


@dataclass(frozen=True)
class Confusion:
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
class MisreadText:
    """An example that got a wrong label."""

    text: str
    label: str
    predicted: str
    text_pair: str | None = None


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of one prompt on the validation split.

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
        texts: Sequence[str] = (),
        *,
        max_confusions: int = 20,
        max_texts: int = 5,
    ) -> Mistakes:
        """Counts the mistakes of predictions.

        Args:
            labels: The true label of each example.
            predicted: The predicted one.
            texts: The examples themselves, if some may be kept.
            max_confusions: How many pairs of labels to keep, the most frequent ones.
            max_texts: How many texts to keep, of different confusions first.
        """
        totals = Counter(labels)
        counts = Counter((a, b) for a, b in zip(labels, predicted, strict=True) if a != b)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        confusions = tuple(Confusion(a, b, n, totals[a]) for (a, b), n in ranked[:max_confusions])
        misread: dict[tuple[str, str], list[MisreadText]] = {pair: [] for pair, _ in ranked}
        examples = zip(texts, labels, predicted, strict=True) if texts else ()
        for text, a, b in examples:
            if a != b:
                misread[a, b].append(MisreadText(text[:_MAX_TEXT], a, b))
        # One of each confusion, then a second of each, …
        rounds = [each[i] for i in range(max_texts) for each in misread.values() if i < len(each)]
        return Mistakes(confusions, tuple(rounds[:max_texts]))

    def to_json(self) -> dict[str, Any]:
        """A dict of strings, numbers and lists."""
        return {
            "confusions": [[c.label, c.predicted, c.count, c.total] for c in self.confusions],
            "texts": [[t.text, t.label, t.predicted] for t in self.texts],
        }

    @staticmethod
    def from_json(payload: Mapping[str, Any]) -> Mistakes:
        """The inverse of :meth:`to_json`."""
        return Mistakes(
            tuple(Confusion(*_row(row, str, str, int, int)) for row in payload["confusions"]),
            tuple(MisreadText(*_row(row, str, str, str)) for row in payload["texts"]),
        )


def _row(row: Any, *kinds: type) -> Any:
    if not isinstance(row, list) or len(row) != len(kinds):
        raise ValueError(f"expected a list of {len(kinds)}, got {row!r}")
    if not all(isinstance(item, kind) for item, kind in zip(row, kinds, strict=True)):
        raise TypeError(f"expected {kinds}, got {row!r}")
    return row
