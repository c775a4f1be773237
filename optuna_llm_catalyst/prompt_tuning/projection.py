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
the words towards which the virtual tokens moved, and *swaps*, the words whose substitution the
gradient predicts to help, of which the best few are then tried for real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import embed
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.trajectory import DriftWord
from optuna_llm_catalyst.trajectory import Swap
from optuna_llm_catalyst.trajectory import TrajectoryPoint


Metric = Literal["cosine", "l2"]

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


def word_table(
    space: PromptSpace, word_embeddings: Tensor, *, also: Sequence[int] = ()
) -> WordTable:
    """The whole words of the vocabulary, and the tokens ``also``, whatever they are."""
    named = dict(space.whole_words)
    for token_id in also:
        if token_id not in named:
            named[token_id] = str(space.tokenizer.decode([token_id])).strip()
    token_ids = tuple(named)
    return WordTable(token_ids, tuple(named.values()), embed([token_ids], word_embeddings)[0])


def nearest(prompt: Tensor, table: WordTable, metric: Metric = "cosine") -> list[int]:
    """The row of the table nearest to each virtual token.

    Law: the embeddings of words of the table give back these words, by every metric.

    Args:
        prompt: Virtual tokens of shape ``(L, d)``.
        table: The words.
        metric: ``cosine``: the largest cosine; ``l2``: the smallest Euclidean distance.
    """
    if metric == "cosine":
        closeness = F.normalize(prompt, dim=-1) @ F.normalize(table.embeddings, dim=-1).T
    elif metric == "l2":
        # -|p - e|² without |p|², which is the same for all words.
        closeness = 2 * prompt @ table.embeddings.T - table.embeddings.square().sum(-1)
    else:
        raise ValueError(f"`metric` must be 'cosine' or 'l2', got {metric!r}.")
    return [int(i) for i in closeness.argmax(-1)]  # closeness: (L, W)


def drift(prompt: Tensor, start: Tensor, table: WordTable) -> tuple[DriftWord, ...]:
    """For each virtual token that moved, the word whose direction from the start fits best.

    The cosine between p_t - p_0 and e_w - p_0, largest over w; strongest first.
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
        DriftWord(position, table.words[int(rows[position])], float(cosines[position]))
        for position in range(len(prompt))
        if length[position] > least[position] and cosines[position].isfinite()
    ]
    return tuple(sorted(found, key=lambda word: -word.cosine))


def promising_swaps(
    hard: Tensor, gradient: Tensor, table: WordTable, n: int
) -> list[tuple[int, int, float]]:
    """The single-word substitutions with the lowest predicted loss.

    To first order the loss changes by (e_w - h_i)·g_i (HotFlip, arXiv 1712.06751, eq. 10).

    Args:
        hard: Embeddings h of the words of a hard prompt, of shape ``(L, d)``.
        gradient: Gradient g of the loss with respect to ``hard``, of shape ``(L, d)``.
        table: The words.
        n: How many to return at most.

    Returns:
        Position, row of the table and predicted change, best first, negative ones only.
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
        model: The frozen model.
        table: The words that may be named; must contain the start's tokens for law 8.
        train: Where the gradient of the swaps comes from.
        validation: Where hard prompts and swaps are measured.
        start: The restart prompt's embeddings, of shape ``(L, d)``.
        metric: How near words are found.
        n_checked_swaps: Swaps that are measured for each new projection; 0 for none.
    """

    def __init__(
        self,
        model: TaskModel,
        table: WordTable,
        train: EncodedSplit,
        validation: EncodedSplit,
        start: Tensor,
        *,
        metric: Metric = "cosine",
        n_checked_swaps: int = 8,
    ) -> None:
        self._model = model
        self._table = table
        self._train = train
        self._validation = validation
        self._start = start
        self._metric: Metric = metric
        self._n_checked_swaps = n_checked_swaps
        # Projections rarely change within a stage: each is measured once.
        self._measured: dict[tuple[int, ...], tuple[float, tuple[Swap, ...]]] = {}

    def point(self, evaluation: Evaluation) -> TrajectoryPoint:
        """The trajectory's point at an evaluation."""
        rows = tuple(nearest(evaluation.prompt, self._table, self._metric))
        if rows not in self._measured:
            self._measured[rows] = self._measure(rows)
        hard_loss, swaps = self._measured[rows]
        return TrajectoryPoint(
            step=evaluation.step,
            words=tuple(self._table.words[row] for row in rows),
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            hard_loss=hard_loss,
            token_ids=tuple(self._table.token_ids[row] for row in rows),
            drift=drift(evaluation.prompt, self._start, self._table),
            swaps=swaps,
        )

    def _measure(self, rows: tuple[int, ...]) -> tuple[float, tuple[Swap, ...]]:
        """The loss of a hard prompt, and its best swaps with the change they really make.

        With a fresh head, where the model has one: the loss is then that of the words, comparable
        with a screened candidate's, and does not depend on when they were met.
        """
        hard = self._table.embeddings[list(rows)]  # (L, d)
        head = self._model.fresh_head(hard.unsqueeze(0), self._train)
        swaps = []
        if self._n_checked_swaps:
            gradient = self._gradient(hard, head)
            swaps = promising_swaps(hard, gradient, self._table, self._n_checked_swaps)
        prompts = hard.repeat(1 + len(swaps), 1, 1)  # (P, L, d), the hard prompt itself first
        for i, (position, row, _) in enumerate(swaps, start=1):
            prompts[i, position] = self._table.embeddings[row]
        heads = {name: h.expand(len(prompts), *h.shape[1:]) for name, h in head.items()}
        hard_loss, *swapped = evaluate(self._model, prompts, heads, self._validation).loss
        checked = [
            Swap(
                position=position,
                old=self._table.words[rows[position]],
                new=self._table.words[row],
                predicted=predicted,
                measured=loss - hard_loss,
            )
            for (position, row, predicted), loss in zip(swaps, swapped, strict=True)
        ]
        return hard_loss, tuple(sorted(checked, key=lambda swap: swap.measured or 0.0))

    def _gradient(self, hard: Tensor, head: Head) -> Tensor:
        """Gradient of the mean training loss at a hard prompt, of shape ``(L, d)``."""
        prompt = hard.clone().requires_grad_()
        order = sorted(range(len(self._train)), key=lambda i: self._train.lengths[i])
        size = self._model.batch_size
        for start in range(0, len(order), size):
            batch = self._train.select(order[start : start + size])
            logits = self._model.logits(prompt.unsqueeze(0), head, batch)
            loss = losses(logits, batch.labels)[0] * (len(batch) / len(order))
            loss.backward()
        assert prompt.grad is not None
        return prompt.grad
