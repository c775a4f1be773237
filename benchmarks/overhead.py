"""What the sampler's bookkeeping costs: ask and tell, no LLM, in memory, beside TPESampler.

Run: ``python benchmarks/overhead.py``. Prints milliseconds an ask and tell of 8 prompt
parameters at different numbers of finished trials, median and 10th to 90th percentile; the
samplers take turns, so that a busy machine disturbs them alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import time

import numpy as np
import optuna
from optuna.trial import TrialState

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import record_trajectory
from optuna_llm_catalyst import records
from optuna_llm_catalyst import Swap
from optuna_llm_catalyst import Trajectory
from optuna_llm_catalyst import TrajectoryPoint


class Words:
    """A tokenizer of as many words as BERT has tokens."""

    vocab_size = 30_522

    def encode(self, text: str) -> list[int]:
        return [_number(word) for word in text.split() if _number(word) < self.vocab_size]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(_word(token_id) for token_id in token_ids)


def _word(number: int) -> str:
    letters = "".join(chr(ord("a") + number // 26**i % 26) for i in range(4))
    return letters


def _number(word: str) -> int:
    return sum((ord(c) - ord("a")) * 26**i for i, c in enumerate(word))


def finished_trial(
    space: PromptSpace, rng: np.random.Generator, number: int
) -> optuna.trial.FrozenTrial:
    """A finished stage with the records that the package's objective leaves."""
    token_ids = [int(i) for i in rng.integers(space.vocab_size, size=space.num_virtual_tokens)]
    prompt = space.from_token_ids(token_ids)
    losses = np.sort(rng.random(7))[::-1]
    trial = optuna.create_trial(
        state=TrialState.PRUNED if number % 5 == 0 else TrialState.COMPLETE,
        params=space.to_params(prompt),
        distributions=dict(space.search_space),
        value=float(losses[-1]),
        intermediate_values={i: float(loss) for i, loss in enumerate(losses)},
        user_attrs={"prompt": prompt.text, "origin": "mutation", "accuracy": 0.5},
    )
    words = tuple(prompt.text.split())
    swaps = tuple(Swap(i, words[i], "abcd", -0.1, -0.01 * i) for i in range(8))
    points = [
        TrajectoryPoint(10 * i, words, float(loss), 0.5, 1.0, prompt.token_ids, (), swaps)
        for i, loss in enumerate(losses)
    ]
    record_trajectory(trial, Trajectory(tuple(points)))
    candidates = [{"text": prompt.text, "token_ids": token_ids, "score": 1.0}] * 4
    records.save(trial, "proposal", {"token_ids": token_ids, "candidates": candidates})
    return trial


def milliseconds(
    study: optuna.Study, space: PromptSpace, sampler: optuna.samplers.BaseSampler
) -> float:
    study.sampler = sampler
    started = time.perf_counter()
    trial = study.ask()
    space.suggest(trial)
    study.tell(trial, 0.5)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tpe-repeats", type=int, default=5)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = PromptSpace(Words(), 8)
    _ = space.words  # Read once for a tokenizer, not once a trial.
    print(f"optuna {optuna.__version__}, 8 parameters of {space.vocab_size} values, in memory")
    print(f"{'finished':>9} {'sampler':>20} {'median ms':>10} {'p10-p90 ms':>16}")
    for size in args.sizes:
        rng = np.random.default_rng(0)
        study = optuna.create_study()
        study.add_trials([finished_trial(space, rng, number) for number in range(size)])
        ours = LLMCatalystSampler(space, seed=0)
        tpe = optuna.samplers.TPESampler(seed=0)
        rows: dict[str, list[float]] = {"LLMCatalystSampler": [], "TPESampler": []}
        for repeat in range(args.repeats):
            rows["LLMCatalystSampler"].append(milliseconds(study, space, ours))
            if repeat < args.tpe_repeats:
                rows["TPESampler"].append(milliseconds(study, space, tpe))
        for name, times in rows.items():
            low, median, high = np.percentile(times, [10, 50, 90])
            print(f"{size:>9} {name:>20} {median:>10.2f} {low:>7.2f}-{high:.2f}")


if __name__ == "__main__":
    main()
