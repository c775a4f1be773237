"""Search without gradients: BBT (arXiv 2201.03514), and BBTv2 for deep prompts (2205.11200).

Each tensor of the prompt is searched in a random subspace of its own: it is ``start + A z``, and
CMA-ES (by the package ``cmaes``) looks for ``z``. With a prompt at the input alone that is BBT.
With one at every layer it is BBTv2: the layers take turns, a population each, while the others
stay at the best that is known.

The entries of ``A`` are normal with the standard deviation ``alpha * spread / sqrt(k)`` for ``k``
numbers in ``z``, where ``spread`` is that of the embeddings, or of the layer's hidden states. The
papers divide by the step size of CMA-ES, too, and let it search with that: the two cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from itertools import islice
import math

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult
from optuna_llm_catalyst.prompt_tuning.stages.queries import evaluated
from optuna_llm_catalyst.prompt_tuning.stages.queries import QueryStage


@dataclass(frozen=True)
class BlackBoxStage(QueryStage):
    """A stage of CMA-ES in random subspaces; the model is only asked for log-probabilities.

    A query is one prompt on the whole training split. A population is one batched call. What
    replaces the incumbent had a lower training loss than it, with the other tensors as they are,
    so the training loss never rises. A head stays as it was fitted at the start.

    Attributes:
        n_queries: Queries, the start's included; what does not fill a population is not spent.
            The tensors of a prompt take turns, so a deep one needs more.
        population_size: Prompts asked for at once.
        intrinsic_dim: Numbers that are searched for each tensor.
        alpha: How far the first population lies from the start, in spreads of the embeddings or
            hidden states.
        eval_every: Queries between two evaluations; the start and the end are always evaluated.
    """

    n_queries: int = 400
    population_size: int = 20
    intrinsic_dim: int = 500
    alpha: float = 1.0
    eval_every: int = 100

    def __post_init__(self) -> None:
        least = self.population_size + 1
        if self.n_queries != 0 and not self.n_queries >= least:
            raise ValueError(
                f"`n_queries` must be 0 or at least {least}, the start and one population of "
                f"{self.population_size}, got {self.n_queries}."
            )
        check_at_least(4, population_size=self.population_size)
        check_at_least(2, intrinsic_dim=self.intrinsic_dim)
        check_at_least(1, eval_every=self.eval_every)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"`alpha` must be positive, got {self.alpha}.")

    @torch.no_grad()
    def run(self, run: Run) -> StageResult:
        prompt = run.start.map(lambda tensor: tensor.detach().float())
        n_populations = max(self.n_queries - 1, 0) // self.population_size
        last = 1 + n_populations * self.population_size if n_populations else 0
        moves = self._moves(run, prompt, n_populations)
        return evaluated(run, prompt, moves, last=last, eval_every=self.eval_every)

    def _moves(self, run: Run, prompt: Prompt, n_populations: int) -> Iterator[tuple[int, Prompt]]:
        """The incumbent after each population, and the queries spent until then."""
        if not n_populations:
            return
        searches = cycle(self._searches(run, prompt))
        loss, spent = run.losses(prompt, run.train)[0], 1
        for search in islice(searches, n_populations):
            found = search.population(run, prompt)
            spent += self.population_size
            if found.loss < loss:
                prompt, loss = found.prompt, found.loss
            yield spent, prompt

    def _searches(self, run: Run, prompt: Prompt) -> Sequence[Search]:
        """One for each tensor that is trained, the input's first."""
        names = list(prompt.trained)
        spreads = run.model.spreads(prompt, run.train)
        seeds = np.random.SeedSequence(run.seed).spawn(len(names))
        searches = []
        for name, seed in zip(names, seeds, strict=True):
            generator = np.random.default_rng(seed)
            deviation = self.alpha * spreads[name]
            subspace = Subspace.random(prompt, name, self.intrinsic_dim, deviation, generator)
            searches.append(self._search(run, subspace, int(generator.integers(2**31))))
        return searches

    def _search(self, run: Run, subspace: Subspace, seed: int) -> Search:
        """The search of one tensor."""
        return Search(subspace, self.population_size, seed)


@dataclass(frozen=True, eq=False)
class Found:
    """The best of a population, and its training loss."""

    prompt: Prompt
    loss: float


@dataclass(frozen=True, eq=False)
class Subspace:
    """What a tensor can become: ``start + A z``.

    Attributes:
        name: The tensor's name.
        start: What it starts from, ``(1, L, d)``.
        projection: ``A``, of shape ``(L * d, k)``.
    """

    name: str
    start: Tensor
    projection: Tensor

    @staticmethod
    def random(
        prompt: Prompt, name: str, k: int, deviation: float, generator: np.random.Generator
    ) -> Subspace:
        """Of ``k`` directions; a normal ``z`` moves each entry by about ``deviation``."""
        start = prompt.tensors[name]
        rows = generator.standard_normal((start.numel(), k), dtype=np.float32)
        rows *= np.float32(deviation / math.sqrt(k))
        return Subspace(name, start, torch.from_numpy(rows).to(start.device))

    def prompts(self, incumbent: Prompt, z: Tensor) -> Prompt:
        """The incumbent with the tensor at each of ``P`` points, (P, k)."""
        moved = (z.to(self.start) @ self.projection.T).view(-1, *self.start.shape[1:])
        others = incumbent.map(lambda tensor: tensor.expand(len(z), *tensor.shape[1:]))
        return Prompt(incumbent.kind, {**others.tensors, self.name: self.start + moved})


class Search:
    """CMA-ES on one tensor of a prompt."""

    def __init__(self, subspace: Subspace, size: int, seed: int) -> None:
        k = subspace.projection.shape[1]
        self._subspace = subspace
        # It imports scipy's statistics where they are installed: a second for all who need none.
        from cmaes import CMA

        self._cma = CMA(mean=np.zeros(k), sigma=1.0, population_size=size, seed=seed)

    def population(self, run: Run, incumbent: Prompt) -> Found:
        """Tries a population while the incumbent's other tensors stay as they are."""
        asked = np.stack([self._cma.ask() for _ in range(self._cma.population_size)])
        points = self._points(asked)  # (P, k)
        prompts = self._subspace.prompts(incumbent, torch.from_numpy(points))
        log_probs = run.model.log_probs(prompts, run.train)
        found = run.losses_of(log_probs, run.train.labels)
        self._cma.tell(list(zip(points, found, strict=True)))
        self._learn(points, log_probs)
        best = min(range(len(found)), key=found.__getitem__)
        return Found(prompts[[best]], found[best])

    def _points(self, asked: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is tried of what CMA-ES asks for, (P, k)."""
        return asked

    def _learn(self, points: NDArray[np.float64], log_probs: Tensor) -> None:
        """Sees what was found at ``P`` points: log-probabilities (P, B, C)."""
