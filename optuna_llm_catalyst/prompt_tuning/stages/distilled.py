"""Black-box search with a student that has a gradient: after GDFO (arXiv 2305.10013).

At every query a student learns what the black box said, by ``KL(black box || student)``. Its
gradient leads from the best point so far to ``z_GD``, and what is tried is
``w z_GD + (1 - w) z_CMA``. That mixture, the student and the check below are ours: the paper's
details were not to be had.

The student is a small network from the point ``z`` to the log-probabilities of the training
examples. So it needs nothing of the black box but its answers, and no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import optuna
import torch
from torch import nn
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.black_box import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages.black_box import Search
from optuna_llm_catalyst.prompt_tuning.stages.black_box import Subspace


_WIDTH = 64
_LEARNING_STEPS = 60
_LEARNING_RATE = 1e-2
#: Steps of the descent between two of the points that are tried, and their length.
_DESCENT_STEPS = 3
_DESCENT_RATE = 5e-2
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True)
class DistilledStage(BlackBoxStage):
    """A stage of CMA-ES that leans towards where a student's gradient leads.

    Budget and incumbent are those of :class:`BlackBoxStage`. Before the student learns from a
    population, its predictions for it are compared with the black box's: on prompts that it has
    not seen. Where too few agree, the next population is CMA-ES's alone, and the log says so.

    Attributes:
        gd_weight: ``w``, the weight of the student's point: 0 is :class:`BlackBoxStage`, 1 the
            student alone.
        min_agreement: The part of predictions that must agree, in [0, 1].
    """

    gd_weight: float = 0.5
    min_agreement: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, gd_weight=self.gd_weight, min_agreement=self.min_agreement)
        for name in ("gd_weight", "min_agreement"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be at most 1, got {getattr(self, name)}.")

    def _search(self, run: Run, subspace: Subspace, seed: int) -> Search:
        return _GuidedSearch(self, subspace, seed, run)


class _GuidedSearch(Search):
    """CMA-ES whose points are mixed with those of a student's descent."""

    def __init__(self, stage: DistilledStage, subspace: Subspace, seed: int, run: Run) -> None:
        super().__init__(subspace, stage.population_size, seed)
        self._stage = stage
        self._labels = run.train.labels.cpu()
        self._student = _Student(stage.intrinsic_dim, len(self._labels), len(run.model.labels))
        self._agreement: float | None = None
        self._has_told = False
        self._best = np.zeros(stage.intrinsic_dim)
        self._best_loss = np.inf

    def _points(self, asked: NDArray[np.float64]) -> NDArray[np.float64]:
        weight = self._stage.gd_weight
        if not weight or self._agreement is None:
            return asked
        if self._agreement < self._stage.min_agreement:
            if not self._has_told:
                _logger.info(
                    f"The student agrees with the black box on {self._agreement:.0%} of "
                    f"predictions, fewer than {self._stage.min_agreement:.0%}: the next "
                    "population is CMA-ES's alone, as others may be."
                )
            self._has_told = True
            return asked
        descent = self._student.descent(self._best, self._labels, len(asked))
        return weight * descent + (1 - weight) * asked

    def _learn(self, points: NDArray[np.float64], log_probs: Tensor) -> None:
        log_probs = log_probs.detach().float().cpu()
        self._agreement = self._student.agreement(points, log_probs)
        self._student.learn(points, log_probs)
        losses = Run.losses_of(log_probs, self._labels)
        if min(losses) < self._best_loss:
            self._best_loss = min(losses)
            self._best = points[losses.index(self._best_loss)]


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A layer with the start that PyTorch gives one, from a generator of its own."""
    layer = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")
    for weights in layer.parameters():
        nn.init.uniform_(weights, -(n_in**-0.5), n_in**-0.5, generator=generator)
    return layer


class _Student(nn.Module):
    """A network from points (P, k) to log-probabilities of the training examples (P, B, C)."""

    def __init__(self, k: int, n_examples: int, n_labels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # Its own: stages may run in threads.
        self._layers = nn.Sequential(
            _linear(k, _WIDTH, generator),
            nn.Tanh(),
            _linear(_WIDTH, n_examples * n_labels, generator),
        )
        self._shape = (n_examples, n_labels)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._optimizer = torch.optim.Adam(self.parameters(), lr=_LEARNING_RATE)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self._layers(z).view(-1, *self._shape)
        return logits.log_softmax(-1)

    def agreement(self, points: NDArray[np.float64], log_probs: Tensor) -> float:
        """The part of predictions in which it agrees with the black box."""
        own = self(torch.from_numpy(points).float()).argmax(-1)
        return float((own == log_probs.argmax(-1)).double().mean())

    @torch.enable_grad()
    def learn(self, points: NDArray[np.float64], log_probs: Tensor) -> None:
        """Some steps on all that was seen."""
        self._seen.append((torch.from_numpy(points).float(), log_probs))
        z, targets = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        for _ in range(_LEARNING_STEPS):
            loss = F.kl_div(self(z), targets, log_target=True, reduction="none").sum(-1).mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    @torch.enable_grad()
    def descent(
        self, start: NDArray[np.float64], labels: Tensor, n_points: int
    ) -> NDArray[np.float64]:
        """Points along the descent of the student's own loss, (n_points, k)."""
        z = torch.from_numpy(start).float().unsqueeze(0).requires_grad_()  # (1, k)
        optimizer = torch.optim.Adam([z], lr=_DESCENT_RATE)
        points = []
        for _ in range(n_points):
            for _ in range(_DESCENT_STEPS):
                (z.grad,) = torch.autograd.grad(F.nll_loss(self(z)[0], labels), [z])
                optimizer.step()
            points.append(z.detach()[0].double().numpy().copy())
        return np.stack(points)
