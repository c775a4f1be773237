"""What a stage leaves behind: a trajectory of points, projected to words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

from optuna_llm_catalyst.schema import AnyFloat
from optuna_llm_catalyst.schema import encode
from optuna_llm_catalyst.schema import Row


@dataclass(frozen=True)
class Swap(Row):
    """A word in place of another, at one position of a prompt.

    Attributes:
        position: Position of the virtual token, from 0.
        old: The word that stands there.
        new: The word that would replace it.
        predicted: Change of the training loss that the gradient predicts, to first order; None
            where there is no gradient.
        measured: Change of the validation loss in a real forward pass; None if not checked.
    """

    position: int
    old: str
    new: str
    predicted: float | None
    measured: float | None = None


@dataclass(frozen=True)
class DriftWord(Row):
    """A word towards which a virtual token has moved.

    Attributes:
        position: Position of the virtual token, from 0.
        word: The word.
        cosine: Cosine between the token's displacement and the direction to the word.
    """

    position: int
    word: str
    cosine: AnyFloat


@dataclass(frozen=True)
class TrajectoryPoint:
    """One evaluation within a stage.

    Attributes:
        step: Optimiser steps done, 0 before the first.
        words: The nearest word of each virtual token.
        loss: Validation loss of the soft prompt, in nats.
        accuracy: Validation accuracy of the soft prompt, in [0, 1].
        hard_loss: Validation loss of the projected words themselves.
        token_ids: The token ids of the projected words; empty if not recorded.
        drift: Words towards which the virtual tokens have moved since the restart.
        swaps: Words whose substitution promises a lower loss.
    """

    step: int
    words: tuple[str, ...]
    loss: AnyFloat
    accuracy: float | None = None
    hard_loss: float | None = None
    token_ids: tuple[int, ...] = ()
    drift: tuple[DriftWord, ...] = ()
    swaps: tuple[Swap, ...] = ()

    @property
    def text(self) -> str:
        """The projected words as one text."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Trajectory:
    """The points of one stage, in the order of their steps."""

    points: tuple[TrajectoryPoint, ...]

    def __post_init__(self) -> None:
        steps = [point.step for point in self.points]
        if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"`points` must have rising steps, got {steps}.")

    @property
    def best(self) -> TrajectoryPoint | None:
        """The first point of the lowest loss; None if no loss is finite."""
        finite = [point for point in self.points if math.isfinite(point.loss)]
        return min(finite, key=lambda point: point.loss, default=None)

    def thinned(self, limit: int = 12) -> Trajectory:
        """At most ``limit`` points, evenly spread, with the first, the best and the last."""
        if limit < 3:
            raise ValueError(f"`limit` must be at least 3, got {limit}.")
        n = len(self.points)
        if n <= limit:
            return self
        keep = {round(i * (n - 1) / (limit - 2)) for i in range(limit - 1)}
        keep |= {i for i, point in enumerate(self.points) if point is self.best}
        return Trajectory(tuple(self.points[i] for i in sorted(keep)))

    def to_json(self) -> dict[str, Any]:
        """A dict of strings, numbers, lists and None; no NaN, which JSON does not know."""
        return dict(encode(self))


def best_swaps(points: Sequence[TrajectoryPoint]) -> tuple[Swap, ...]:
    """The swaps that a real forward pass found to help, best first, one a position and word."""
    helpful = {
        (swap.position, swap.new): swap
        for point in points
        for swap in point.swaps
        if swap.measured is not None and swap.measured < 0
    }
    return tuple(sorted(helpful.values(), key=lambda s: (s.measured or 0.0, s.position, s.new)))
