"""What a stage costs, against other ways to the same end: pairs in one process, taking turns.

Run: ``python -m benchmarks.speed DATA`` with the folder of a task; ``--only`` picks comparisons.
``peft`` needs ``pip install peft accelerate``. A busy machine disturbs all arms of a comparison
alike; the ratios are those of each round. Reading a model is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any
import warnings

import torch
import transformers
from transformers import AutoModelForMaskedLM

from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import MaskedLMClassifier
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import stages
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import stacked
from optuna_llm_catalyst.prompt_tuning.split import Split


WORDS = "this question is about a thing that we"
BATCH, EVAL_EVERY, LR = 16, 10, 5e-3
STAGES_AT_ONCE = (1, 2, 4, 8, 16)
POPULATION = 20
Run = Callable[[], object]
#: By name, what prepares an arm of a comparison and returns what is timed.
Arms = dict[str, Callable[[], Run]]


def as_is(run: Run) -> Callable[[], Run]:
    """An arm that needs no preparation."""
    return lambda: run


class Bench:
    """A task on frozen models, and the comparisons of ``COMPARISONS``.

    Args:
        task: The task.
        n_steps: Steps of a stage.
    """

    def __init__(self, task: Task, n_steps: int) -> None:
        self.task = task
        self.n_steps = n_steps
        self.pretrained = load_pretrained()
        self.ids: list[int] = self.pretrained.tokenizer(WORDS, add_special_tokens=False)[
            "input_ids"
        ]

    def sequence(self) -> SequenceClassifier:
        return SequenceClassifier(
            self.pretrained, self.task.labels, max_virtual_tokens=len(self.ids)
        )

    def dual(self) -> DualEncoderClassifier:
        return DualEncoderClassifier(self.pretrained, self.task.labels)

    def starts(self, model: TaskModel, train: Split, n: int) -> list[Prompt]:
        """So many prompts at the same words, in another order each."""
        turns = [i % len(self.ids) for i in range(n)]
        return [model.start([self.ids[turn:] + self.ids[:turn]], train) for turn in turns]

    def stages(self, model: TaskModel, n_stages: int, **options: Any) -> Run:
        """So many stages, with the fit of fresh heads, in one expanded batch."""
        train, validation = model.encode(self.task.train), model.encode(self.task.validation)
        stage = GradientStage(n_steps=self.n_steps, lr=LR, eval_every=EVAL_EVERY, **options)

        def run() -> None:
            starts = self.starts(model, train, n_stages)
            stage.run_batch([stages.Run(model, start, train, validation) for start in starts])

        return run

    def peft(self) -> Arms:
        """A stage against prompt tuning of peft with the Trainer of transformers."""
        stage = self.stages(self.sequence(), 1, batch_size=BATCH)
        trainer = trainer_of(self.pretrained, self.task, self.n_steps)
        return {"stage": as_is(stage), "peft with Trainer": trainer}

    def cached(self) -> Arms:
        """A step of the dual encoder against one that encodes its texts again."""
        model = self.dual()
        train = model.encode(self.task.train)
        prompt = model.start([self.ids], train).map(lambda t: t.clone().requires_grad_())

        def step(batch: Split) -> None:
            losses(model.log_probs(prompt, batch), batch.labels).sum().backward()

        return {
            "step on cached features": as_is(lambda: step(train)),
            f"step that encodes its {len(train)} texts": as_is(
                lambda: step(model.encode(self.task.train))
            ),
            f"step that encodes {BATCH} texts": as_is(
                lambda: step(model.encode(self.task.train[:BATCH]))
            ),
        }

    def population_labels(self) -> Arms:
        """A population of prompts before the labels in one batched call, and one by one."""
        return self._population(self.dual())

    def population_texts(self) -> Arms:
        """A population of prompts before the texts in one batched call, and one by one."""
        return self._population(self.sequence())

    def _population(self, model: TaskModel) -> Arms:
        train = model.encode(self.task.train)
        prompts = stacked(self.starts(model, train, POPULATION))
        run = stages.Run(model, prompts[[0]], train, train)
        return {
            f"one call of {POPULATION}": as_is(_queried(run, prompts, POPULATION)),
            f"{POPULATION} calls": as_is(_queried(run, prompts, 1)),
        }

    def masked_head(self) -> Arms:
        """The head at the blank and for the labels' words against the head of the whole model."""
        torch.manual_seed(0)
        whole = AutoModelForMaskedLM.from_config(self.pretrained.encoder.config).eval()
        pretrained = Pretrained.of(whole, self.pretrained.tokenizer, name="random")
        words = {label: ["thing"] for label in self.task.labels}
        model = MaskedLMClassifier(pretrained, self.task.labels, verbalizers=words)
        split = model.encode(self.task.train[:64])
        prompt = model.start([self.ids], split)
        embedded = torch.cat(
            [prompt.words().expand(len(split), -1, -1), _embedded(whole, split)], dim=1
        )
        mask = torch.cat([torch.ones(len(split), len(self.ids)), split.rows("attention_mask")], 1)

        @torch.no_grad()
        def cut() -> None:
            model.log_probs(prompt, split)

        @torch.no_grad()
        def full() -> None:
            whole(inputs_embeds=embedded, attention_mask=mask)

        return {"the blank's words": as_is(cut), "all positions and words": as_is(full)}

    def at_once_labels(self) -> Arms:
        """Stages of a prompt before the labels in one expanded batch."""
        model = self.dual()
        return {f"{n} stages": as_is(self.stages(model, n)) for n in STAGES_AT_ONCE}

    def at_once_texts(self) -> Arms:
        """Stages of a prompt before the texts in one expanded batch."""
        model = self.sequence()
        return {
            f"{n} stages": as_is(self.stages(model, n, batch_size=BATCH)) for n in STAGES_AT_ONCE
        }


def _queried(run: stages.Run, prompts: Prompt, size: int) -> Run:
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]  # type: ignore[misc]
    return lambda: [run.losses(part, run.train) for part in parts]


def _embedded(model: Any, split: Split) -> torch.Tensor:
    found: torch.Tensor = model.get_input_embeddings()(split.rows("input_ids")).detach()
    return found  # (B, T, d)


def trainer_of(pretrained: Pretrained, task: Task, n_steps: int) -> Callable[[], Run]:
    """An arm that trains with peft's prompt tuning and the Trainer of transformers."""
    from peft import get_peft_model
    from peft import PromptTuningConfig
    from peft import PromptTuningInit

    tokenizer = pretrained.tokenizer
    train, validation = (
        [{**tokenizer(e.text, truncation=True, max_length=128), "labels": e.label} for e in split]
        for split in (task.train, task.validation)
    )
    config: Any = pretrained.encoder.config
    n_tokens = len(tokenizer(WORDS, add_special_tokens=False)["input_ids"])

    def prepare() -> Run:
        kind = transformers.AutoModelForSequenceClassification
        whole = kind.from_config(
            type(config)(**config.to_dict() | {"num_labels": len(task.labels)})
        )
        whole.base_model.load_state_dict(pretrained.encoder.state_dict(), strict=False)
        folder = tempfile.TemporaryDirectory()
        tokenizer.save_pretrained(folder.name)
        prompted = get_peft_model(
            whole,
            PromptTuningConfig(
                task_type="SEQ_CLS",
                num_virtual_tokens=n_tokens,
                prompt_tuning_init=PromptTuningInit.TEXT,
                prompt_tuning_init_text=WORDS,
                tokenizer_name_or_path=folder.name,
            ),
        )
        arguments = transformers.TrainingArguments(
            folder.name,
            max_steps=n_steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=EVAL_EVERY,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            learning_rate=LR,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            prompted,
            arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[],
        )
        trainer.remove_callback(transformers.PrinterCallback)

        def run() -> None:
            with folder:
                trainer.train()

        return run

    return prepare


COMPARISONS: dict[str, Callable[[Bench], Arms]] = {
    "peft": Bench.peft,
    "cached": Bench.cached,
    "population-labels": Bench.population_labels,
    "population-texts": Bench.population_texts,
    "masked-head": Bench.masked_head,
    "at-once-labels": Bench.at_once_labels,
    "at-once-texts": Bench.at_once_texts,
}


def timed(arms: Arms, n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; before them each arm ran once, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(n_rounds + 1):
        for name, prepare in arms.items():
            run = prepare()
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Median, smallest and largest, and the ratios to the first arm of each round."""
    first = next(iter(seconds.values()))
    rows = ["| | milliseconds | times the first |", "|---|---|---|"]
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        rows.append(f"| {name} | {_spread(values, 1000)} | {_spread(ratios, 1)} |")
    return "\n".join(rows)


def _spread(values: list[float], factor: float) -> str:
    shown = (factor * value for value in (statistics.median(values), min(values), max(values)))
    return "{} ({}–{})".format(*(f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of a task")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    bench = Bench(few_shot(load_task(args.data), args.shots, seed=0), args.steps)
    print(f"{args.data.name}, {args.shots} shots, {torch.get_num_threads()} threads")
    for name in args.only:
        print(f"\n{COMPARISONS[name].__doc__}\n")
        print(table(timed(COMPARISONS[name](bench), args.rounds)), flush=True)


if __name__ == "__main__":
    main()
