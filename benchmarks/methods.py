"""The methods side by side: one stage each, from the same words, on the same frozen encoder.

    python -m benchmarks.methods trec sst2 --out methods.jsonl

Each row of the report is a method on a task model, over tasks and seeds: test accuracy, and its
difference from the start, the passes that were counted, seconds, and the peak memory of a process
that runs that stage alone. Backward passes count two forward ones, as is usual. Without gradients
a query is one prompt on the training split: ``--queries`` is what a stage may spend.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
import json
import multiprocessing
from pathlib import Path
import resource
import statistics
import time
from typing import Any

from benchmarks.product import make_task
from benchmarks.product import read_rows
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import DistilledStage
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.objective import TEXT_STAGE
from optuna_llm_catalyst.prompt_tuning.prompts import on_both_sides
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.proposers.templates import fill


Row = dict[str, Any]
KINDS: dict[str, PromptKind] = {
    "soft": SoftPrompt(),
    "deep": DeepPrompt(),
    "lowrank": LowRankPrompt(),
}
SIDES = ("labels", "texts", "both")


def methods(args: argparse.Namespace) -> dict[str, tuple[str, Stage]]:
    """The kind of prompt and the stage of each method, by its name."""
    steps: dict[str, Any] = {"n_steps": args.steps, "lr": args.lr}
    queries = {"n_queries": args.queries, "eval_every": max(args.queries // 20, 1)}
    search = {**queries, "intrinsic_dim": args.intrinsic_dim, "alpha": args.alpha}
    return {
        "gradient": ("soft", GradientStage(**steps)),
        "gradient, deep": ("deep", GradientStage(**steps)),
        "gradient, lowrank": ("lowrank", GradientStage(**steps)),
        "contrastive": ("soft", ContrastiveStage(**steps)),
        "contrastive, deep": ("deep", ContrastiveStage(**steps)),
        "bbt": ("soft", BlackBoxStage(**search)),
        "bbtv2": ("deep", BlackBoxStage(**search)),
        "gdfo": ("soft", DistilledStage(**search)),
        "zo": ("soft", ZerothOrderStage(**queries)),
        "zo, deep": ("deep", ZerothOrderStage(**queries)),
    }


def make_model(
    pretrained: Pretrained, sides: str, labels: tuple[str, ...], args: argparse.Namespace
) -> TaskModel:
    """A prompt before texts (SequenceClassifier), or before labels, too (DualEncoder)."""
    if sides != "texts":
        return DualEncoderClassifier(pretrained, labels, max_length=args.max_length)
    return SequenceClassifier(pretrained, labels, max_length=args.max_length, max_virtual_tokens=8)


def can_be(sides: str, method: str) -> bool:
    """Whether a method is run on these sides: a contrastive one needs a head."""
    sort = method.partition(",")[0]
    return sort == "gradient" or sides == "texts" or (sides == "labels" and sort != "contrastive")


def run(folder: Path, seed: int, sides: str, method: str, args: argparse.Namespace) -> Row:
    """One stage, tested."""
    kind, stage = methods(args)[method]
    task = make_task(folder, seed, args)
    pretrained = load_pretrained()
    model = make_model(pretrained, sides, tuple(task.labels), args)
    space = PromptSpace(pretrained.tokenizer, 8)
    train, validation, test = (model.encode(x) for x in (task.train, task.validation, task.test))
    words = fill(space, task.description, task.labels)[seed]
    if sides == "both":
        of_kind, stage = on_both_sides(KINDS[kind]), replace(TEXT_STAGE, n_steps=args.steps)
    else:
        of_kind = KINDS[kind]
    start = model.start([words.token_ids], train, of_kind)
    before = evaluate(model, start, test).accuracy[0]
    started = time.perf_counter()
    with model.metered() as passes:
        result = stage.run(Run(model, start, train, validation, seed))
    seconds = time.perf_counter() - started
    return {
        "task": folder.name,
        "seed": seed,
        "sides": sides,
        "method": method,
        "before": before,
        "accuracy": evaluate(model, result.best.prompt, test).accuracy[0],
        "loss": result.best.loss,
        "spent": result.spent,
        "forward": passes.forward,
        "backward": passes.backward,
        "sequences": passes.sequences,
        "seconds": round(seconds, 1),
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def report(rows: list[Row]) -> Iterator[str]:
    """Means over tasks and seeds, as Markdown."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["sides"], row["method"]].append(row)
    columns = (
        "before, method, runs, start, after, gain ± s.e., validation loss, spent, "
        "passes (forward / backward), sequences, seconds, peak MB"
    )
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 12 + "|"
    for (sides, method), runs in found.items():
        gains = [100 * (row["accuracy"] - row["before"]) for row in runs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0

        def mean(key: str, of: list[Row] = runs) -> float:
            return statistics.mean(row[key] for row in of)

        cells = [
            sides,
            method,
            len(runs),
            f"{mean('before'):.1%}",
            f"{mean('accuracy'):.1%}",
            f"{statistics.mean(gains):+.1f} ± {error:.1f}",
            f"{mean('loss'):.3f}",
            f"{mean('spent'):.0f}",
            f"{mean('forward'):.0f} / {mean('backward'):.0f}",
            f"{mean('sequences'):.0f}",
            f"{mean('seconds'):.1f}",
            f"{mean('megabytes'):.0f}",
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="*", help="folders of tasks; none to report only")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["labels", "texts"])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3, help="of stages with gradients")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--intrinsic-dim", type=int, default=500)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--test-examples", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, one line a run")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    names = args.methods or list(methods(args))
    keys = ("task", "seed", "sides", "method")
    known = {tuple(row[key] for key in keys) for row in read_rows(args.out)}
    for folder in args.data:
        for seed in args.seeds:
            for sides in args.sides:
                for method in names:
                    is_known = (folder.name, seed, sides, method) in known
                    if is_known or not can_be(sides, method):
                        continue
                    # In a process of its own, whose peak memory is that of one stage.
                    context = multiprocessing.get_context("spawn")
                    with ProcessPoolExecutor(1, mp_context=context) as pool:
                        row = pool.submit(run, folder, seed, sides, method, args).result()
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    print("\n".join(report(read_rows(args.out))))


if __name__ == "__main__":
    main()
