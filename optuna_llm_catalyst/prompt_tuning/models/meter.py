"""Passes through a frozen model, counted: the currency in which methods are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import threading
from typing import Any

from torch import nn


@dataclass
class Passes:
    """How often a frozen model was run.

    Attributes:
        forward: Forward passes, each over one batch.
        backward: Backward passes.
        sequences: Sequences in the forward passes.
    """

    forward: int = 0
    backward: int = 0
    sequences: int = 0

    def add(self, other: Passes) -> None:
        """Adds what was counted elsewhere."""
        self.forward += other.forward
        self.backward += other.backward
        self.sequences += other.sequences

    def take(self, other: Passes) -> None:
        """Takes away what was counted elsewhere, too."""
        self.add(Passes(-other.forward, -other.backward, -other.sequences))


class _Open(threading.local):
    """The counts that this thread keeps now, each with the model it is for."""

    counts: tuple[tuple[object, Passes], ...] = ()


_OPEN = _Open()


def install(encoder: nn.Module) -> None:
    """Puts the meter on a model, for good.

    A hook that came and went with each trial could be called half removed by another thread.
    """
    if _count not in encoder._forward_hooks.values():
        encoder.register_forward_hook(_count, with_kwargs=True)


@contextmanager
def metered(model: object) -> Iterator[Passes]:
    """Counts every pass of this thread through a model that has a meter, or counts itself."""
    passes = Passes()
    before = _OPEN.counts
    _OPEN.counts = (*before, (model, passes))
    try:
        yield passes
    finally:
        _OPEN.counts = before


def count(model: object, n_sequences: int) -> None:
    """Counts a forward pass of this thread through a model that counts itself."""
    _add(_open_of(model), n_sequences)


def _open_of(model: object) -> list[Passes]:
    """The counts that this thread keeps for a model."""
    return [passes for counted, passes in _OPEN.counts if counted is model]


def _add(counts: list[Passes], n_sequences: int) -> None:
    for passes in counts:
        passes.forward += 1
        passes.sequences += n_sequences


def _count(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    counts = _open_of(encoder)
    if not counts:
        return
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
    _add(counts, len(next(rows for rows in given if rows is not None)))
    hidden = output.last_hidden_state
    if hidden.requires_grad:
        # The backward pass may run in another thread: these counts are its own.
        hidden.register_hook(lambda _: _count_backward(counts))


def _count_backward(counts: list[Passes]) -> None:
    for passes in counts:
        passes.backward += 1
