"""Soft prompts back to words.

================  ============  =====================================================
notation          shape         meaning
================  ============  =====================================================
``prompt``, p_t   (L, d)        virtual tokens at a step
``start``, p_0    (L, d)        virtual tokens at the restart
``table.embed…``  (W, d)        embeddings of the words that may be named, e_w
``gradient``, g   (L, d)        gradient of the training loss at a hard prompt h
================  ============  =====================================================

Nearest words hardly move while the embeddings do, so two more signals are read off: *drift*,
the words towards which the virtual tokens moved, and *swaps*, substitutions of one word that are
tried for real: those that the gradient predicts to help most or, without a gradient, the words of
the drift.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.trajectory import DriftWord
from optuna_llm_catalyst.trajectory import Swap
from optuna_llm_catalyst.trajectory import TrajectoryPoint


Distance = Literal["cosine", "l2"]
Embed = Callable[[Sequence[Sequence[int]]], Tensor]

#: Rows of a table of words, one a position; words in place of others: a position and a row each.
Rows = tuple[int, ...]
Replacements = tuple[tuple[int, int], ...]
_Key = tuple[Rows, Replacements]

#: A virtual token that moved by less than this part of its norm has no direction to speak of.
_MIN_DRIFT = 1e-3
_SWAPS_PER_POSITION = 2


@dataclass(frozen=True)
class WordTable:
    """The words that a projection may name.

    Attributes:
        token_ids: Their token ids, ``W`` of them.
        words: Their texts.
        embeddings: Their embeddings in float32, of shape ``(W, d)``.
    """

    token_ids: tuple[int, ...]
    words: tuple[str, ...]
    embeddings: Tensor


def word_table(space: PromptSpace, embed: Embed, *, also: Sequence[int] = ()) -> WordTable:
    """The whole words of the vocabulary and the tokens ``also``, as a model embeds them."""
    named = dict(space.whole_words)
    for token_id in also:
        if token_id not in named:
            named[token_id] = str(space.tokenizer.decode([token_id])).strip()
    token_ids = tuple(named)
    return WordTable(token_ids, tuple(named.values()), embed([token_ids])[0])


def nearest(prompt: Tensor, table: WordTable, distance: Distance = "cosine") -> list[int]:
    """The row of the table nearest to each virtual token.

    Law: the embeddings of words of the table give back these words, by every distance.

    Args:
        prompt: Virtual tokens of shape ``(L, d)``.
        table: The words.
        distance: ``cosine``: the largest cosine; ``l2``: the smallest Euclidean distance.
    """
    if distance == "cosine":
        closeness = F.normalize(prompt, dim=-1) @ F.normalize(table.embeddings, dim=-1).T
    elif distance == "l2":
        # -|p - e|² without |p|², which is the same for all words.
        closeness = 2 * prompt @ table.embeddings.T - table.embeddings.square().sum(-1)
    else:
        raise ValueError(f"`distance` must be 'cosine' or 'l2', got {distance!r}.")
    return [int(i) for i in closeness.argmax(-1)]  # closeness: (L, W)


def drift(prompt: Tensor, start: Tensor, table: WordTable) -> list[tuple[int, int, float]]:
    """For each virtual token that moved, the word whose direction from the start fits best.

    The cosine between p_t - p_0 and e_w - p_0, largest over w; strongest first. Each is a
    position, a row of the table and the cosine.
    """
    moved = prompt - start  # (L, d)
    # (e_w - p_0)·(p_t - p_0), and its norms, without a tensor of shape (L, W, d).
    inner = moved @ table.embeddings.T - (moved * start).sum(-1, keepdim=True)  # (L, W)
    norms = torch.cdist(start, table.embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    length = moved.norm(dim=-1, keepdim=True)  # (L, 1)
    fits = inner / (norms * length).clamp(min=1e-12)
    # The start's own word lies in no direction, but rounding would give it one.
    least = _MIN_DRIFT * start.norm(dim=-1, keepdim=True)  # (L, 1)
    cosines, rows = fits.masked_fill(norms < least, -torch.inf).max(-1)
    found = [
        (position, int(rows[position]), float(cosines[position]))
        for position in range(len(prompt))
        if length[position] > least[position] and cosines[position].isfinite()
    ]
    return sorted(found, key=lambda word: -word[2])


def promising_swaps(
    hard: Tensor, gradient: Tensor, table: WordTable, n: int
) -> list[tuple[int, int, float]]:
    """The single-word substitutions with the lowest predicted loss.

    To first order the loss changes by (e_w - h_i)·g_i (HotFlip, arXiv 1712.06751, eq. 10). Each of
    the ``n`` best is a position, a row of the table and a negative change.
    """
    change = gradient @ table.embeddings.T - (gradient * hard).sum(-1, keepdim=True)  # (L, W)
    values, rows = change.topk(min(_SWAPS_PER_POSITION, change.shape[1]), largest=False)
    swaps = [
        (position, int(row), float(value))
        for position in range(len(hard))
        for value, row in zip(values[position], rows[position], strict=True)
        if value < 0
    ]
    return sorted(swaps, key=lambda swap: swap[2])[:n]


class Projector:
    """Turns the evaluations of one stage into points of its trajectory.

    Args:
        run: The stage's run.
        table: The words that may be named; must contain the start's tokens.
        distance: How near words are found.
        n_checked_swaps: Swaps that are measured for each new projection, at most.
        by_gradient: Whether the gradient says which swaps to measure, if the model has one.
            Otherwise the drift does, one word a position, and its words are measured whenever
            they change.
    """

    def __init__(
        self,
        run: Run,
        table: WordTable,
        *,
        distance: Distance = "cosine",
        n_checked_swaps: int = 8,
        by_gradient: bool = True,
    ) -> None:
        self._run = run
        self._model = run.model
        self._kind = run.start.kind
        self._start = run.start.words()[0].detach()  # (L, d)
        self._table = table
        self._distance: Distance = distance
        self._n_checked_swaps = n_checked_swaps
        self._by_gradient = by_gradient and run.model.is_differentiable
        # Projections rarely change within a stage: each is measured once.
        self._measured: dict[_Key, tuple[float, tuple[Swap, ...]]] = {}

    def point(self, evaluation: Evaluation) -> TrajectoryPoint:
        """The trajectory's point at an evaluation."""
        words = evaluation.prompt.words()[0]  # (L, d)
        rows = tuple(nearest(words, self._table, self._distance))
        moved = drift(words, self._start, self._table)
        drifted = () if self._by_gradient else self._new_words(rows, moved)
        if (rows, drifted) not in self._measured:
            self._measured[rows, drifted] = self._measure(rows, drifted)
        hard_loss, swaps = self._measured[rows, drifted]
        return TrajectoryPoint(
            step=evaluation.step,
            words=tuple(self._table.words[row] for row in rows),
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            hard_loss=hard_loss,
            token_ids=self._token_ids(rows),
            drift=tuple(DriftWord(at, self._table.words[row], fit) for at, row, fit in moved),
            swaps=swaps,
        )

    def _new_words(self, rows: Rows, moved: Sequence[tuple[int, int, float]]) -> Replacements:
        """The words of the drift that stand elsewhere than their position, the first few."""
        words = [(position, row) for position, row, _ in moved if rows[position] != row]
        return tuple(words[: self._n_checked_swaps])

    def _measure(self, rows: Rows, drifted: Replacements) -> tuple[float, tuple[Swap, ...]]:
        """The loss of a hard prompt, and its best swaps with the change they really make.

        With a fresh head, where the model has one: the loss is then that of the words, comparable
        with a screened candidate's, and does not depend on when they were met.
        """
        hard = self._model.start([self._token_ids(rows)], self._run.train, self._kind)
        swaps: list[tuple[int, int, float | None]] = [(*swap, None) for swap in drifted]
        if self._by_gradient and self._n_checked_swaps:
            gradient = self._gradient(rows, hard)
            embeddings = self._table.embeddings[list(rows)]  # (L, d)
            swaps += promising_swaps(embeddings, gradient, self._table, self._n_checked_swaps)
        swapped = [_replaced(rows, position, row) for position, row, _ in swaps]
        tried = self._placed(self._model.embed([self._token_ids(r) for r in (rows, *swapped)]))
        tried = tried.with_head(hard.head)
        hard_loss, *losses_ = evaluate(self._model, tried, self._run.validation).loss
        checked = [
            Swap(
                position=position,
                old=self._table.words[rows[position]],
                new=self._table.words[row],
                predicted=predicted,
                measured=loss - hard_loss,
            )
            for (position, row, predicted), loss in zip(swaps, losses_, strict=True)
        ]
        return hard_loss, tuple(sorted(checked, key=lambda swap: swap.measured or 0.0))

    def _gradient(self, rows: tuple[int, ...], hard: Prompt) -> Tensor:
        """Gradient of the mean training loss with respect to the words, of shape ``(L, d)``."""
        embeddings = self._model.embed([self._token_ids(rows)]).requires_grad_()  # (1, L, d)
        train = self._run.train
        for indices in train.batches(self._model.batch_size):
            batch = train.select(indices)
            prompt = self._placed(embeddings).with_head(hard.head)
            loss = losses(self._model.log_probs(prompt, batch), batch.labels)[0]
            (loss * (len(batch) / len(train))).backward()
        assert embeddings.grad is not None
        return embeddings.grad[0]

    def _placed(self, embeddings: Tensor) -> Prompt:
        return Prompt(self._kind, self._kind.start(embeddings, self._model.placement))

    def _token_ids(self, rows: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._table.token_ids[row] for row in rows)


def _replaced(rows: Rows, position: int, row: int) -> Rows:
    return (*rows[:position], row, *rows[position + 1 :])
