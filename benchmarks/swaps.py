"""Which swaps of words help after a stage without gradients: of its drift, random, or others?

After a stage of BBT from random words, one word of its nearest words is replaced at a time: by the
word towards which its position drifted (what a trajectory measures without gradients), by a random
word at the same position, or as the gradient would have it. As many of each are tried. The
replacement with the lowest validation loss is then measured on test examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import statistics
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.product import make_task
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import nearest
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning import word_table
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained
from optuna_llm_catalyst.prompt_tuning.projection import drift
from optuna_llm_catalyst.prompt_tuning.projection import promising_swaps
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.proposers.mutation import random_prompt


class Bench:
    """One task, the splits of which are encoded once."""

    def __init__(self, task: Task, seed: int, args: argparse.Namespace) -> None:
        pretrained = load_pretrained()
        self.model = DualEncoderClassifier(pretrained, task.labels, max_length=args.max_length)
        splits = (task.train, task.validation, task.test)
        self.train, self.validation, self.test = map(self.model.encode, splits)
        self.random = np.random.default_rng(seed)
        space = PromptSpace(pretrained.tokenizer, args.num_virtual_tokens)
        ids = random_prompt(space, self.random).token_ids
        self.table = word_table(space, self.model.embed, also=ids)
        start = self.model.start([ids], self.train)
        run = Run(self.model, start, self.train, self.validation, seed)
        found = BlackBoxStage(n_queries=args.queries).run(run).best.prompt.words()[0]  # (L, d)
        self.rows = nearest(found, self.table)
        moved = drift(found, start.words()[0].detach(), self.table)
        self.drift = [(at, row) for at, row, _ in moved if self.rows[at] != row]

    def ways(self) -> dict[str, list[tuple[int, int]]]:
        """Positions and rows of the table, as many of each way."""
        others = self.random.integers(len(self.table.words), size=len(self.drift))
        hard = self.table.embeddings[self.rows].clone().requires_grad_()  # (L, d)
        self._loss(hard).backward()
        assert hard.grad is not None
        swaps = promising_swaps(hard.detach(), hard.grad, self.table, len(self.drift))
        return {
            "drift": self.drift,
            "random": [(at, int(row)) for (at, _), row in zip(self.drift, others, strict=True)],
            "gradient": [(at, row) for at, row, _ in swaps],
        }

    def changes(self, swaps: Sequence[tuple[int, int]]) -> dict[str, float]:
        """How many of the swaps help, and what the best of them changes."""
        replaced = [self.rows, *([*self.rows[:i], row, *self.rows[i + 1 :]] for i, row in swaps)]
        prompt = self._prompt(self.table.embeddings[torch.tensor(replaced)])  # (1 + n, L, d)
        validation, test = (self._changes(prompt, split) for split in (self.validation, self.test))
        best = int(np.argmin(validation))
        return {
            "helped": statistics.mean(change < 0 for change in validation),
            "validation": validation[best],
            "test": test[best],
        }

    def _changes(self, prompt: Prompt, split: Split) -> list[float]:
        before, *after = evaluate(self.model, prompt, split).loss
        return [loss - before for loss in after]

    def _loss(self, words: torch.Tensor) -> torch.Tensor:
        log_probs = self.model.log_probs(self._prompt(words[None]), self.train)
        return losses(log_probs, self.train.labels)[0]

    def _prompt(self, words: torch.Tensor) -> Prompt:
        return Prompt(SoftPrompt(), SoftPrompt().start(words, self.model.placement))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="folders of tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--test-examples", type=int, default=500)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for folder in args.data:
        for seed in args.seeds:
            bench = Bench(make_task(folder, seed, SimpleNamespace(**vars(args))), seed, args)
            for way, swaps in bench.ways().items():
                row = bench.changes(swaps)
                found.setdefault(way, []).append(row)
                print(json.dumps({"task": folder.name, "seed": seed, "way": way, **row}))
    print("\n| swaps | helped | validation loss, best | test loss, best |\n|---|---|---|---|")
    for way, rows in found.items():
        helped = statistics.mean(row["helped"] for row in rows)
        cells = [_change([row[name] for row in rows]) for name in ("validation", "test")]
        print(f"| {way} | {100 * helped:.0f}% | {' | '.join(cells)} |")


def _change(changes: Sequence[float]) -> str:
    error = statistics.stdev(changes) / len(changes) ** 0.5
    return f"{statistics.mean(changes):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
