"""Does restarting help? The command line on one task, over seeds and arms.

Run: ``python benchmarks/restarts.py DATA --out results.jsonl``. Each run is a fresh process of
``optuna-llm-catalyst tune`` with its own storage, so wall time and peak memory are what a user
sees. Arms have equal numbers of optimiser steps:

* ``long``: one stage of all the steps, no restart,
* ``random``: every stage starts from random whole words,
* ``mutation``: random words three times, then mutations of what worked, screened,
* ``llm``: random words three times, then an LLM's proposals, screened (needs ``--llm``).

The first stages of all arms but ``long`` are the same one, the column ``first stage``: what the
first tenth of the steps comes to.
The stage is chosen by validation loss and reported on the test split.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def run(data: Path, seed: int, arm: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of the command line: its JSON, wall seconds and peak memory in GB."""
    stages, steps = (1, args.stages * args.steps) if arm == "long" else (args.stages, args.steps)
    command = [
        *(sys.executable, "-c", "from optuna_llm_catalyst.cli import main; main()"),
        *("tune", str(data), "--json", "--storage", "sqlite:///study.db"),
        *("--shots", str(args.shots), "--seed", str(seed)),
        *("--stages", str(stages), "--steps", str(steps)),
        *("--llm", args.llm if arm == "llm" else "mutation"),
        *("--startup", "random"),
        *("--n-startup-trials", str(args.stages if arm == "random" else 3)),
    ]
    started = time.perf_counter()
    with (folder / "out.json").open("w") as out, (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log.txt').read_text()}")
    document = json.loads((folder / "out.json").read_text())
    return {
        "task": data.name,
        "arm": arm,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "peak_gb": usage.ru_maxrss / 1e6,
        **document,
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Test accuracy by seed and arm, in per cent, as Markdown."""
    seeds = sorted({row["seed"] for row in results})
    columns: dict[str, dict[int, float]] = {"first stage": {}}
    for row in results:
        if row["arm"] != "long":
            columns["first stage"][row["seed"]] = 100 * row["test"]["first"]["accuracy"]
        columns.setdefault(row["arm"], {})[row["seed"]] = 100 * row["test"]["chosen"]["accuracy"]
    first = columns["first stage"]
    columns = {name: values for name, values in columns.items() if values}
    lines = ["| seed | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for seed in seeds:
        cells = [f"{values[seed]:.1f}" for values in columns.values()]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    means = [f"{statistics.mean(v.values()):.1f}" for v in columns.values()]
    lines.append("| mean | " + " | ".join(means) + " |")
    if first and len(seeds) > 1:
        gains = [[values[seed] - first[seed] for seed in seeds] for values in columns.values()]
        spread = [
            f"{statistics.mean(g):+.1f} ± {statistics.stdev(g) / len(g) ** 0.5:.1f}" for g in gains
        ]
        lines.append("| minus first stage, ± s.e. | " + " | ".join(spread) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=["long", "random", "mutation"])
    parser.add_argument("--llm", default="ollama", help="the LLM of the arm llm")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSONL file, one line a run")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        for arm in args.arms:
            with tempfile.TemporaryDirectory() as folder:
                row = run(args.data.resolve(), seed, arm, args, Path(folder))
            results.append(row)
            print(f"seed {seed}, {arm}: {row['seconds']:.0f} s, {row['peak_gb']:.2f} GB")
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n".join(table(results)))
    seconds = [row["seconds"] for row in results]
    print(f"\nwall: {min(seconds):.0f} to {max(seconds):.0f} s a run, model loading included;")
    print(f"peak memory: {max(row['peak_gb'] for row in results):.2f} GB")


if __name__ == "__main__":
    main()
