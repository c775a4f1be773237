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

from dataclasses import dataclass
from dataclasses import replace
import math

from cmaes import CMA
import numpy as np
import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult


@dataclass(frozen=True)
class BlackBoxStage:
    """A stage of CMA-ES in random subspaces; the model is only asked for log-probabilities.

    A query is one prompt on the whole training split. A population is one batched call. What
    replaces the incumbent had a lower training loss than it, with the other tensors as they are,
    so the training loss never rises. A head stays as it was fitted at the start.

    Attributes:
        n_queries: Queries, the start's included. Tensors get equally many populations: what is
            left over is not spent.
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
        check_at_least(0, n_queries=self.n_queries)
        check_at_least(4, population_size=self.population_size)
        check_at_least(2, intrinsic_dim=self.intrinsic_dim)
        check_at_least(1, eval_every=self.eval_every)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"`alpha` must be positive, got {self.alpha}.")

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def budget(self) -> int:
        return self.n_queries

    def with_budget(self, budget: int) -> BlackBoxStage:
        return replace(self, n_queries=budget)

    @torch.no_grad()
    def run(self, run: Run) -> StageResult:
        prompt = run.start.map(lambda tensor: tensor.detach().float())
        searches = self._searches(run, prompt)
        per_round = self.population_size * len(searches)
        n_rounds = max(self.n_queries - 1, 0) // per_round
        best = now = run.evaluate(prompt, 0)
        stopped = run.observe(now)
        loss, spent = math.inf, 0
        if n_rounds and not stopped:
            loss, spent = run.losses(prompt, run.train)[0], 1
        for is_last in (i == n_rounds - 1 for i in range(n_rounds)):
            if stopped:
                break
            for search in searches:
                found = search.population(run, prompt)
                spent += self.population_size
                if found.loss < loss:
                    prompt, loss = found.prompt, found.loss
            if is_last or spent - now.step >= self.eval_every:
                now = run.evaluate(prompt, spent)
                best = now if run.is_better(now, best) else best
                stopped = run.observe(now)
        return StageResult(best, spent, stopped)

    def _searches(self, run: Run, prompt: Prompt) -> list[_Search]:
        """One for each tensor that is trained, the input's first."""
        names = list(prompt.trained)
        spreads = run.model.spreads(prompt, run.train)
        seeds = np.random.SeedSequence(run.seed).spawn(len(names))
        return [
            _Search(self, name, prompt.tensors[name], spreads[name], np.random.default_rng(seed))
            for name, seed in zip(names, seeds, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Found:
    """The best of a population, and its training loss."""

    prompt: Prompt
    loss: float


class _Search:
    """CMA-ES on one tensor of a prompt.

    Attributes:
        projection: ``A``, of shape ``(L * d, k)``.
    """

    def __init__(
        self,
        stage: BlackBoxStage,
        name: str,
        start: Tensor,
        spread: float,
        generator: np.random.Generator,
    ) -> None:
        self._name = name
        self._start = start  # (1, L, d)
        self._size = stage.population_size
        deviation = stage.alpha * spread / math.sqrt(stage.intrinsic_dim)
        rows = generator.standard_normal((start.numel(), stage.intrinsic_dim), dtype=np.float32)
        self.projection = torch.from_numpy(rows * np.float32(deviation)).to(start.device)
        self._cma = CMA(
            mean=np.zeros(stage.intrinsic_dim),
            sigma=1.0,
            population_size=stage.population_size,
            seed=int(generator.integers(2**31)),
        )

    def population(self, run: Run, incumbent: Prompt) -> _Found:
        """Tries a population while the incumbent's other tensors stay as they are."""
        points = [self._cma.ask() for _ in range(self._size)]
        z = torch.from_numpy(np.stack(points)).to(self._start)  # (P, k)
        tried = self._start + (z @ self.projection.T).view(-1, *self._start.shape[1:])
        others = incumbent.map(lambda tensor: tensor.expand(self._size, *tensor.shape[1:]))
        prompts = Prompt(incumbent.kind, {**others.tensors, self._name: tried})
        found = run.losses(prompts, run.train)
        self._cma.tell(list(zip(points, found, strict=True)))
        best = min(range(self._size), key=found.__getitem__)
        return _Found(prompts[[best]], found[best])
