"""What is each section of the meta-prompt worth? Paired runs over tasks and seeds.

Run: ``python benchmarks/ablation.py DATA... --arms random none ranked all --llm ollama:gemma3:4b
--record replies/``; without ``--arms``, those that need no LLM. For each task and seed all arms
have the same first stages, from the same random words, the same number of stages and steps, and
the same screening; they differ in where the other stages start:

* ``random``: random whole words, ``mutation``: mutations of what worked; no LLM,
* ``ranked``: the LLM, with the sections that are the default (ranked history),
* ``none``: the LLM, with the task and the request alone,
* ``+NAME`` and ``-NAME``: the LLM, with one section more or less than ``ranked``,
* ``all``: the LLM, with all sections (``examples`` only with ``--share-examples``).

``--record DIR`` keeps the LLM's replies, one file a run; ``--llm replay:DIR`` repeats the runs
without the LLM. Reported are differences from the arm ``--reference`` within each pair of
task and seed: their mean, its standard error and how many are positive.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
import json
from pathlib import Path
import statistics
import tempfile
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.cli.export import reply_rows
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.options import LLMOptions
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers import Provider


WITHOUT_LLM = ("random", "mutation")
#: What the LLM is told of tasks whose card says nothing.
DESCRIPTIONS = {
    "ag_news": "Sort news by their topic.",
    "sst2": "Tell whether a sentence from a film review is positive or negative.",
    "subj": "Tell whether a sentence about a film is an opinion or tells its plot.",
    "trec": "Sort questions by the kind of answer they ask for.",
}
MEASURES = {
    "chosen": "test accuracy of the stage chosen by validation loss",
    "restarts": "mean test accuracy of all stages after the first ones",
    "loss": "validation loss of the chosen stage",
}


def sections_of(arm: str) -> tuple[str, ...]:
    """The sections of an arm that asks an LLM."""
    if arm == "all":
        return tuple(SECTIONS)
    if arm == "none":
        return ("task", "request")
    sign, name = arm[:1], arm[1:]
    if arm != "ranked" and (sign not in "+-" or name not in SECTIONS):
        raise SystemExit(
            f"arm {arm!r} is none of {', '.join(WITHOUT_LLM)}, ranked, none, all, +-NAME"
        )
    kept = {*DEFAULT_SECTIONS, name} if sign == "+" else {*DEFAULT_SECTIONS} - {name}
    return tuple(section for section in SECTIONS if section in kept)


def make_objective(
    folder: Path, seed: int, args: argparse.Namespace, pretrained: Any
) -> PromptTuningObjective:
    """The objective that all arms of a task and seed share."""
    task = few_shot(load_task(folder), args.shots, seed)
    return PromptTuningObjective(
        DualEncoderClassifier(pretrained, task.labels),
        task,
        PromptSpace(pretrained.tokenizer, args.num_virtual_tokens),
        stage=GradientStage(n_steps=args.steps),
        seed=seed,
        artifact_store=FileSystemArtifactStore(tempfile.mkdtemp()),
        share_examples=args.share_examples,
    )


def make_sampler(
    objective: PromptTuningObjective,
    arm: str,
    seed: int,
    provider: Provider | None,
    args: argparse.Namespace,
) -> LLMCatalystSampler:
    """The sampler of an arm."""
    task, proposer = objective.task, None
    if arm not in WITHOUT_LLM:
        assert provider is not None
        shown = {example.label: example.text for example in reversed(task.train)}
        proposer = LLMProposer(
            provider,
            task.description or DESCRIPTIONS.get(task.name, f"Classify texts ({task.name})."),
            labels=task.labels,
            examples=[(text, task.labels[label]) for label, text in sorted(shown.items())]
            if args.share_examples
            else (),
            mechanism=DualEncoderClassifier.mechanism,
            n_validation=len(task.validation),
            n_stages=args.stages,
            sections=sections_of(arm),
            edit_horizon=args.stages,
            timeout=args.llm_timeout,
        )
    return LLMCatalystSampler(
        objective.space,
        proposer=proposer,
        startup="random",
        n_startup_trials=args.stages if arm == "random" else args.startup,
        n_candidates=args.candidates,
        screen=objective.score,
        seed=seed,
    )


def run(
    objective: PromptTuningObjective,
    arm: str,
    seed: int,
    provider: Provider | None,
    args: argparse.Namespace,
) -> tuple[dict[str, Any], optuna.Study]:
    """One run: its measures and its study."""
    study = optuna.create_study(
        sampler=make_sampler(objective, arm, seed, provider, args),
        pruner=optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=args.stages)
    store = objective.prompts.artifact_store
    accuracies = [
        objective.test(load_soft_prompt(study, trial_number=i, artifact_store=store)).accuracy
        for i in range(args.stages)
    ]
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    return {
        "task": objective.task.name,
        "seed": seed,
        "arm": arm,
        "chosen": accuracies[study.best_trial.number],
        "restarts": statistics.mean(accuracies[args.startup :]),
        "loss": study.best_value,
        "first": accuracies[0],
        "accuracies": accuracies,
        "origins": origins,
        "n_fallbacks": 0 if arm in WITHOUT_LLM else origins[args.startup :].count("mutation"),
        "forward_sequences": sum(t.user_attrs["forward_sequences"] for t in study.trials),
        "backward_passes": sum(t.user_attrs["backward_passes"] for t in study.trials),
    }, study


def report(rows: list[dict[str, Any]], reference: str) -> Iterator[str]:
    """Means of each arm and paired differences from the reference, as Markdown."""
    by_arm: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["task"], row["seed"]] = row
    for measure, meaning in MEASURES.items():
        yield f"\n{meaning}, and its difference from `{reference}` within each pair:\n"
        yield f"| arm | runs | mean | minus `{reference}` ± s.e. | better in | LLM fell back |"
        yield "|---|---|---|---|---|---|"
        for arm, runs in by_arm.items():
            mean = statistics.mean(row[measure] for row in runs.values())
            pairs = runs.keys() & by_arm.get(reference, {}).keys()
            gains = [runs[p][measure] - by_arm[reference][p][measure] for p in sorted(pairs)]
            fallbacks = sum(row["n_fallbacks"] for row in runs.values())
            yield (
                f"| {arm} | {len(runs)} | {mean:.3f} | {_difference(arm, reference, gains)} | "
                f"{_share(measure, gains)} | {fallbacks} |"
            )


def _difference(arm: str, reference: str, gains: list[float]) -> str:
    if arm == reference or len(gains) < 2:
        return ""
    error = statistics.stdev(gains) / len(gains) ** 0.5
    return f"{statistics.mean(gains):+.3f} ± {error:.3f}"


def _share(measure: str, gains: list[float]) -> str:
    better = sum(gain < 0 if measure == "loss" else gain > 0 for gain in gains)
    return f"{better} of {len(gains)}" if gains else ""


def provider_of(args: argparse.Namespace, arm: str, name: str) -> Provider | None:
    """The LLM of one run; a replayed one has a file of its own."""
    if arm in WITHOUT_LLM:
        return None
    if args.llm.startswith("replay:"):
        return ReplayProvider(Path(args.llm.removeprefix("replay:")) / f"{name}.jsonl")
    provider, line = choose_llm(
        LLMOptions(llm=args.llm, llm_url=args.llm_url, num_ctx=args.num_ctx)
    )
    if provider is None:
        raise SystemExit(f"the arm {arm!r} needs an LLM: {line}")
    return provider


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="folders of tasks")
    parser.add_argument("--arms", nargs="+", default=["random", "mutation"])
    parser.add_argument("--reference", default="random")
    parser.add_argument("--llm", default="mutation", help="as for tune; or replay:FOLDER")
    parser.add_argument("--llm-url", default="")
    parser.add_argument("--llm-timeout", type=float, default=300)
    parser.add_argument("--num-ctx", type=int, default=8192)
    parser.add_argument("--share-examples", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--startup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--record", type=Path, help="folder for the LLM's replies")
    parser.add_argument("--out", type=Path, help="JSONL file, one line a run")
    args = parser.parse_args()
    if args.stages <= args.startup:
        parser.error("--stages must be above --startup: the others are what is compared")
    for arm in args.arms:
        if arm not in WITHOUT_LLM:
            sections_of(arm)  # Raises for a name that is none.
    return args


def main() -> None:
    args = parse_arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pretrained = load_pretrained()
    rows = []
    for folder in args.data:
        for seed in args.seeds:
            objective = make_objective(folder, seed, args, pretrained)
            for arm in args.arms:
                name = f"{folder.name}-{seed}-{arm}"
                row, study = run(objective, arm, seed, provider_of(args, arm, name), args)
                rows.append(row)
                print(f"{name}: chosen {row['chosen']:.3f}, restarts {row['restarts']:.3f}")
                if args.record and arm not in WITHOUT_LLM:
                    args.record.mkdir(parents=True, exist_ok=True)
                    lines = [json.dumps(reply) + "\n" for reply in reply_rows(study)]
                    (args.record / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    print("\n".join(report(rows, args.reference)))


if __name__ == "__main__":
    main()
