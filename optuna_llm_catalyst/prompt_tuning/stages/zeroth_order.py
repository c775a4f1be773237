"""Gradient estimates from two queries: SPSA with a seed in place of the noise, as MeZO has it.

``g = (loss(x + e z) - loss(x - e z)) / (2 e)``, and a step is ``x - lr g z`` (arXiv 2305.17333).
The conservative step asks for the losses at ``x``, ``x - lr g z`` and ``x + lr g z``, too, and
keeps the best of the three (arXiv 2402.11592). Here ``z`` is normal with the spread of what the
prompt stands among, so ``e`` and ``lr`` mean the same for every model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import math
from typing import Literal

import numpy as np
import torch

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages.base import Run
from optuna_llm_catalyst.prompt_tuning.stages.base import StageResult
from optuna_llm_catalyst.prompt_tuning.stages.gradient import bucketed_batches
from optuna_llm_catalyst.prompt_tuning.stages.queries import evaluated
from optuna_llm_catalyst.prompt_tuning.stages.queries import QueryStage


@dataclass(frozen=True)
class ZerothOrderStage(QueryStage):
    """A stage of gradient estimates; the model is only asked for log-probabilities.

    A query is one prompt on one batch. Those of a step are one batched call, or two. The noise is
    never kept: it is drawn again from its seed. A head stays as it was fitted at the start.

    Attributes:
        n_queries: Queries: a step needs 2, a conservative one 5. What is left over is not spent.
        lr: Learning rate.
        epsilon: How far the two queries lie from the prompt, in spreads.
        rule: ``plain``, or ``conservative``: the best of standing, stepping and stepping back.
        batch_size: Examples a batch; None for the model's own.
        eval_every: Queries between two evaluations; the start and the end are always evaluated.
    """

    n_queries: int = 400
    lr: float = 5.0
    epsilon: float = 0.1
    rule: Literal["plain", "conservative"] = "plain"
    batch_size: int | None = None
    eval_every: int = 100

    def __post_init__(self) -> None:
        check_at_least(0, n_queries=self.n_queries)
        check_at_least(1, batch_size=self.batch_size, eval_every=self.eval_every)
        for name in ("lr", "epsilon"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.rule not in ("plain", "conservative"):
            raise ValueError(f"`rule` must be 'plain' or 'conservative', got {self.rule!r}.")

    @torch.no_grad()
    def run(self, run: Run) -> StageResult:
        prompt = run.start.map(lambda tensor: tensor.detach().float())
        per_step = 2 if self.rule == "plain" else 5
        n_steps = self.n_queries // per_step
        return evaluated(
            run,
            prompt,
            self._moves(run, prompt, n_steps, per_step),
            last=n_steps * per_step,
            eval_every=self.eval_every,
            # A prompt that is not a number never becomes one again.
            is_over=lambda now: not math.isfinite(now.loss),
        )

    def _moves(
        self, run: Run, prompt: Prompt, n_steps: int, per_step: int
    ) -> Iterator[tuple[int, Prompt]]:
        """The prompt after each step, and the queries spent until then."""
        spreads = run.model.spreads(prompt, run.train)
        batches = bucketed_batches(
            run.train.lengths, self.batch_size or run.model.batch_size, run.seed
        )
        for step in range(n_steps):
            batch = run.train.select(next(batches))
            prompt = self._step(run, prompt, batch, _Noise(spreads, (run.seed, step)))
            yield (step + 1) * per_step, prompt

    def _step(self, run: Run, prompt: Prompt, batch: Split, noise: _Noise) -> Prompt:
        """The prompt after one step on a batch."""
        above, below = run.losses(noise.moved(prompt, (self.epsilon, -self.epsilon)), batch)
        step = self.lr * (above - below) / (2 * self.epsilon)
        if self.rule == "plain":
            return noise.moved(prompt, (-step,))
        three = noise.moved(prompt, (0.0, -step, step))
        found = run.losses(three, batch)
        return three[[min(range(3), key=found.__getitem__)]]


@dataclass(frozen=True)
class _Noise:
    """A random direction, kept as its seed."""

    spreads: dict[str, float]
    seed: tuple[int, int]

    def moved(self, prompt: Prompt, sizes: tuple[float, ...]) -> Prompt:
        """``P`` prompts: a prompt moved along the direction by each of the sizes."""
        (seed,) = np.random.SeedSequence(self.seed).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        tensors = {n: t.expand(len(sizes), *t.shape[1:]) for n, t in prompt.tensors.items()}
        for name, tensor in prompt.trained.items():
            z = self.spreads[name] * torch.randn(tensor.shape, generator=generator)
            along = torch.tensor(sizes).view(-1, *[1] * (tensor.ndim - 1)) * z  # (P, …)
            tensors[name] = tensor + along.to(tensor.device)
        return Prompt(prompt.kind, tensors)
