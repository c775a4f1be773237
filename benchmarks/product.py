"""What a study leaves beside what it is compared with, over tasks, seeds and ways to start.

Runs a study for each task, seed, arm and kind of sides, tests all that the study's report
compares, and prints the means with paired differences. An arm is where starts come from:

    random      random words
    templates   templates that name the task, then none
    mutation    two templates, then mutation
    none        an LLM that sees the task only
    ranked      an LLM that sees the ranked history
    pools       ranked, and asked for one candidate near the best, others in other wordings
    ensemble    ranked, and told what the ensemble so far confuses
    all, +NAME, -NAME   sections of the meta-prompt, more or fewer

Needs the extra ``demo``. Rows go to a JSONL file as they are made, and a run that is in it is not
made again. ``--llm replay:benchmarks/replies/product.zip`` repeats the recorded runs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import replace
import gzip
import json
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any
import zipfile

import optuna
from optuna.artifacts import FileSystemArtifactStore

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.cli.export import reply_rows
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.options import LLMOptions
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import product
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers import Provider


#: The tasks' own cards have no descriptions.
DESCRIPTIONS = {
    "ag_news": "Sort news by their topic.",
    "dbpedia": "Sort encyclopedia articles by the kind of thing that they are about.",
    "sst2": "Tell whether a sentence from a film review is positive or negative.",
    "subj": "Tell whether a sentence about a film is an opinion or tells its plot.",
    "trec": "Sort questions by the kind of answer they ask for.",
    "yelp_polarity": "Tell whether a customer's review of a business is positive or negative.",
}
WITHOUT_LLM = ("random", "templates", "mutation")
SIDES = ("labels", "both")
_N_MUTATION_STARTS = 2
#: What tells one run from another.
KEYS = ("task", "seed", "sides", "arm", "screen", "stage")
#: What rows of before there were other stages have.
DEFAULT_STAGE = "gradient"
MEAN_STAGE = "mean of stages"
COMPARED = (MEAN_STAGE, product.ENSEMBLE, product.FITTED)
Row = dict[str, Any]
#: Accuracies by task and seed.
Scores = dict[tuple[str, int], float]


def sections_of(arm: str) -> tuple[str, ...]:
    """The sections of an arm that asks an LLM."""
    named = {"all": tuple(SECTIONS), "none": ("task", "mechanism", "request")}
    if arm in named:
        return named[arm]
    changes = {"ranked": "", "pools": "+pools", "ensemble": "+ensemble"}
    change = changes.get(arm, arm)
    name = change[1:]
    if change and (change[0] not in "+-" or name not in SECTIONS):
        known = ", ".join([*WITHOUT_LLM, *named, *changes])
        raise SystemExit(f"arm {arm!r} is none of {known}, +NAME, -NAME")
    kept = set(DEFAULT_SECTIONS) - {name} if change[:1] == "-" else {*DEFAULT_SECTIONS, name}
    return tuple(section for section in SECTIONS if section in kept)


def screen_of(arm: str, args: argparse.Namespace) -> str:
    """How an arm's candidates are screened. Without an LLM there is one way only."""
    screen: str = "own" if arm in WITHOUT_LLM else args.screen
    return screen


def make_task(folder: Path, seed: int, args: argparse.Namespace) -> Task:
    """A few-shot task with the first of its test examples."""
    task = few_shot(load_task(folder), args.shots, seed)
    return replace(
        task,
        test=task.test[: args.test_examples],
        description=task.description or DESCRIPTIONS.get(folder.name, ""),
    )


def stage_of(args: argparse.Namespace) -> Stage:
    """What a trial does."""
    if args.stage == "bbt":
        return BlackBoxStage(n_queries=args.queries)
    return GradientStage(n_steps=args.steps)


def make_objective(
    task: Task, sides: str, seed: int, args: argparse.Namespace, pretrained: Any
) -> PromptTuningObjective:
    """The objective of a run."""
    return PromptTuningObjective(
        DualEncoderClassifier(pretrained, task.labels, max_length=args.max_length),
        task,
        PromptSpace(pretrained.tokenizer, args.num_virtual_tokens),
        stage=stage_of(args),
        n_text_prompts=SIDES.index(sides),
        seed=seed,
        artifact_store=FileSystemArtifactStore(tempfile.mkdtemp()),
        n_checked_swaps=0 if args.no_swaps else 8,
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
    if provider is not None:
        proposer = LLMProposer(
            provider,
            task.description,
            labels=task.labels,
            mechanism=DualEncoderClassifier.mechanism,
            n_validation=len(task.validation),
            n_stages=args.stages,
            sections=sections_of(arm),
            edit_horizon=args.stages,
            timeout=args.llm_timeout,
        )
    n_startup = {"random": args.stages, "templates": args.stages, "mutation": _N_MUTATION_STARTS}
    return LLMCatalystSampler(
        objective.space,
        task_description=task.description,
        labels=task.labels,
        proposer=proposer,
        startup="random" if arm == "random" else "task",
        n_startup_trials=n_startup.get(arm, 0),
        n_candidates=args.candidates,
        screen={
            "own": objective.score,
            "ensemble": objective.score_in_ensemble,
            "none": None,
        }[screen_of(arm, args)],
        seed=seed,
    )


def run(
    objective: PromptTuningObjective,
    arm: str,
    seed: int,
    provider: Provider | None,
    args: argparse.Namespace,
) -> tuple[Row, optuna.Study]:
    """One run: its test accuracies and its study."""
    started = time.perf_counter()
    study = optuna.create_study(
        sampler=make_sampler(objective, arm, seed, provider, args),
        pruner=optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=args.stages)
    trained = time.perf_counter()
    found = product.measure(objective, study)
    labels = [example.label for example in objective.task.test]
    stages = [
        objective.test(objective.prompts.load(study, trial.number)).accuracy
        for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    ]
    origins = [trial.user_attrs["origin"] for trial in study.trials]
    return {
        "scores": {
            name: _accuracy(labels, p.argmax(-1).tolist()) for name, p in found.log_probs.items()
        },
        "stages": stages,
        "mean stage": statistics.mean(stages),
        "value": study.best_value,
        "origins": origins,
        "prompts": [trial.user_attrs["prompt"] for trial in study.trials],
        "n_fallbacks": 0 if arm in WITHOUT_LLM else len(origins) - origins.count("llm"),
        "forward_sequences": sum(t.user_attrs["forward_sequences"] for t in study.trials),
        "seconds": round(trained - started, 1),
    }, study


def _accuracy(labels: list[int], predictions: list[int]) -> float:
    return statistics.mean(int(a == b) for a, b in zip(labels, predictions, strict=True))


def report(rows: Sequence[Row], reference: str) -> Iterator[str]:
    """What each arm leaves, and how the arms differ, as Markdown."""
    others: dict[str, Scores] = defaultdict(dict)
    arms: dict[tuple[str, str], dict[str, Scores]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        pair = row["task"], row["seed"]
        if "arm" not in row:  # Another method, such as SetFit.
            others[row["name"]][pair] = row["accuracy"]
            continue
        arm = arms[row["sides"], label_of(row)]
        for name, score in {**row["scores"], MEAN_STAGE: row["mean stage"]}.items():
            arm[name][pair] = score
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for (sides, arm), found in arms.items():
        yield from _rows_of(f"{sides}, {arm}", {**found, **others}, tasks)
    for sides in SIDES:
        of_side = {arm: found for (side, arm), found in arms.items() if side == sides}
        if reference in of_side and len(of_side) > 1:
            yield from _arms_of(sides, of_side, reference)


def _rows_of(title: str, found: dict[str, Scores], tasks: Sequence[str]) -> Iterator[str]:
    """An arm's rows, by task."""
    yield f"\n{title}:\n"
    yield f"| row | runs | mean | fitted minus it | higher in | {' | '.join(tasks)} |"
    yield "|---" * (5 + len(tasks)) + "|"
    fitted = found[product.FITTED]
    for name, scores in found.items():
        common = [pair for pair in fitted if pair in scores]
        if not common:
            continue
        lead, higher = "", ""
        if name != product.FITTED:
            leads = [fitted[pair] - scores[pair] for pair in common]
            lead, higher = _lead(leads), str(sum(x > 0 for x in leads))
        by_task = [[scores[pair] for pair in common if pair[0] == task] for task in tasks]
        means = " | ".join(f"{100 * statistics.mean(x):.1f}" if x else "" for x in by_task)
        mean = 100 * statistics.mean(scores[pair] for pair in common)
        yield f"| {name} | {len(common)} | {mean:.1f} | {lead} | {higher} | {means} |"


def _arms_of(sides: str, arms: dict[str, dict[str, Scores]], reference: str) -> Iterator[str]:
    """Each arm beside the reference, in the pairs of task and seed that both have."""
    yield f"\n{sides}, minus `{reference}` in the same pairs:\n"
    yield f"| arm | pairs | {' | '.join(f'{name} | minus' for name in COMPARED)} |"
    yield "|---" * (2 + 2 * len(COMPARED)) + "|"
    theirs = arms[reference]
    for arm, found in arms.items():
        common = [pair for pair in found[product.FITTED] if pair in theirs[product.FITTED]]
        cells = []
        for name in COMPARED if common else ():
            leads = [found[name][pair] - theirs[name][pair] for pair in common]
            mean = 100 * statistics.mean(found[name][pair] for pair in common)
            cells += [f"{mean:.1f}", "" if arm == reference else _lead(leads)]
        yield f"| {arm} | {len(common)} | {' | '.join(cells)} |"


def _lead(leads: list[float]) -> str:
    if len(leads) < 2:
        return f"{100 * leads[0]:+.1f}"
    error = statistics.stdev(leads) / len(leads) ** 0.5
    return f"{100 * statistics.mean(leads):+.1f} ± {100 * error:.1f}"


def label_of(row: Row) -> str:
    """A row's arm, with the stage and the way to screen if they are not the default."""
    stage = row.get("stage", DEFAULT_STAGE)
    screen = "" if row["screen"] == "own" else f", {row['screen']} screen"
    return ("" if stage == DEFAULT_STAGE else f"{stage}, ") + row["arm"] + screen


def provider_of(args: argparse.Namespace, arm: str, name: str) -> Provider | None:
    """The LLM of one run; a replayed one has a file of its own."""
    if arm in WITHOUT_LLM:
        return None
    if args.llm.startswith("replay:"):
        return ReplayProvider(args.replies / f"{name}.jsonl")
    provider, line = choose_llm(
        LLMOptions(llm=args.llm, llm_url=args.llm_url, num_ctx=args.num_ctx)
    )
    if provider is None:
        raise SystemExit(f"the arm {arm!r} needs an LLM: {line}")
    return provider


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="*", help="folders of tasks; none to report only")
    parser.add_argument("--arms", nargs="+", default=["random", "templates"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--llm", default="mutation", help="as for tune; or replay:ZIP-OR-FOLDER")
    parser.add_argument("--llm-url", default="")
    parser.add_argument("--llm-timeout", type=float, default=300)
    parser.add_argument("--num-ctx", type=int, default=8192)
    parser.add_argument("--screen", choices=("own", "ensemble", "none"), default="own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--test-examples", type=int, default=500)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--stage", choices=(DEFAULT_STAGE, "bbt"), default=DEFAULT_STAGE)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--queries", type=int, default=400, help="of a stage without gradients")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--no-swaps", action="store_true", help="measure no word swaps")
    parser.add_argument("--reference", default="templates", help="what arms are compared with")
    parser.add_argument("--record", type=Path, help="folder for the LLM's replies")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, one line a run")
    args = parser.parse_args()
    if args.data and args.out.suffix == ".gz":
        parser.error("--out must be a plain file to write to: a compressed one is only read")
    for arm in args.arms:
        if arm not in WITHOUT_LLM:
            sections_of(arm)  # Raises for a name that is none.
    args.replies = Path(args.llm.removeprefix("replay:"))
    if args.replies.suffix == ".zip":
        with zipfile.ZipFile(args.replies) as file:
            args.replies = Path(tempfile.mkdtemp())
            file.extractall(args.replies)
    return args


def read_rows(path: Path) -> list[Row]:
    """The rows made so far; from a compressed file, too."""
    if not path.exists():
        return []
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    args = parse_arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = {tuple(row.get(k, DEFAULT_STAGE) for k in KEYS) for row in read_rows(args.out)}
    pretrained = load_pretrained() if args.data else None
    folders = {folder.name: folder for folder in args.data}
    runs = [
        (task, seed, sides, arm, screen_of(arm, args), args.stage)
        for task in folders
        for seed in args.seeds
        for sides in args.sides
        for arm in args.arms
    ]
    for key in (run for run in runs if run not in known):
        task, seed, sides, arm, screen, stage = key
        others = [x for x in (screen, stage) if x not in ("own", DEFAULT_STAGE)]
        name = "-".join(map(str, [task, seed, sides, arm, *others]))
        folder = folders[task]
        objective = make_objective(make_task(folder, seed, args), sides, seed, args, pretrained)
        row, study = run(objective, arm, seed, provider_of(args, arm, name), args)
        row = {**dict(zip(KEYS, key, strict=True)), **row}
        print(f"{name}: {row['seconds']} s", {n: f"{s:.3f}" for n, s in row["scores"].items()})
        if args.record and arm not in WITHOUT_LLM:
            args.record.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(reply) + "\n" for reply in reply_rows(study)]
            (args.record / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print("\n".join(report(read_rows(args.out), args.reference)))


if __name__ == "__main__":
    main()
