"""One stage of prompt tuning against peft's prompt tuning with the Trainer of transformers.

Run: ``pip install peft accelerate``, then ``python benchmarks/speed.py DATA``. Both train the same
8 virtual tokens from the same words and a linear head on the same frozen encoder and few-shot
examples, for as many steps and evaluations. They take turns in one process, so that a busy machine
disturbs them alike; the ratio is of each pair. Reading the model is not timed; fitting the fresh
head is part of our stage.
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

from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning.stages import Run


WORDS = "this question is about a thing that we"
BATCH, EVAL_EVERY, LR = 16, 10, 5e-3


def make_stage(pretrained: Pretrained, task: Task, n_steps: int) -> Callable[[], float]:
    """A function that runs our stage and returns its seconds."""
    ids = pretrained.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    model = SequenceClassifier(pretrained, task.labels, max_virtual_tokens=len(ids))
    train, validation = model.encode(task.train), model.encode(task.validation)
    stage = GradientStage(n_steps=n_steps, lr=LR, batch_size=BATCH, eval_every=EVAL_EVERY)

    def run() -> float:
        started = time.perf_counter()
        stage.run(Run(model, model.start([ids], train), train, validation))
        return time.perf_counter() - started

    return run


def make_trainer(pretrained: Pretrained, task: Task, n_steps: int) -> Callable[[], float]:
    """A function that runs the Trainer on peft's model and returns its seconds."""
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

    def run() -> float:
        kind = transformers.AutoModelForSequenceClassification
        whole = kind.from_config(
            type(config)(**config.to_dict() | {"num_labels": len(task.labels)})
        )
        whole.base_model.load_state_dict(pretrained.encoder.state_dict(), strict=False)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            prompted = get_peft_model(
                whole,
                PromptTuningConfig(
                    task_type="SEQ_CLS",
                    num_virtual_tokens=n_tokens,
                    prompt_tuning_init=PromptTuningInit.TEXT,
                    prompt_tuning_init_text=WORDS,
                    tokenizer_name_or_path=folder,
                ),
            )
            arguments = transformers.TrainingArguments(
                folder,
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
            started = time.perf_counter()
            trainer.train()
            return time.perf_counter() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of a task")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    task = few_shot(load_task(args.data), args.shots, seed=0)
    pretrained = load_pretrained()
    runs = {"stage": make_stage, "peft": make_trainer}
    timed = {name: make(pretrained, task, args.steps) for name, make in runs.items()}
    for run in timed.values():
        run()  # The first one imports and warms up.
    seconds = {name: [] for name in timed}
    for _ in range(args.rounds):
        for name, run in timed.items():
            seconds[name].append(run())
    for name, values in seconds.items():
        print(
            f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
        )
    ratios = [b / a for a, b in zip(seconds["stage"], seconds["peft"], strict=True)]
    print(
        f"peft takes {statistics.median(ratios):.2f} times as long "
        f"({min(ratios):.2f} to {max(ratios):.2f}); {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
