"""SetFit on the same draws: it trains the whole encoder, on train or on train and validation.

Needs ``setfit`` besides the extra ``demo``; it is no dependency of the project. Rows go to the
file of ``product.py``, whose report shows them, with the seconds that training took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
import tempfile
import time
from types import SimpleNamespace

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel
from setfit import Trainer
from setfit import TrainingArguments

from benchmarks.product import make_task
from benchmarks.product import read_rows
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained


SPLITS = {"SetFit, train": ("train",), "SetFit, train and validation": ("train", "validation")}


def as_dataset(examples: list[Example]) -> Dataset:
    """Texts and labels as SetFit takes them."""
    return Dataset.from_dict(
        {"text": [e.text for e in examples], "label": [e.label for e in examples]}
    )


def accuracy_of(
    source: str, train: list[Example], test: list[Example], seed: int, max_length: int
) -> tuple[float, float]:
    """Test accuracy, and the processor seconds of training: the wall's, if it has a core alone."""
    encoder = SentenceTransformer(source, device="cpu")
    encoder.max_seq_length = max_length
    n_labels = 1 + max(example.label for example in train)
    model = SetFitModel(model_body=encoder, model_head=_head(), labels=list(range(n_labels)))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        batch_size=16,
        num_epochs=1,
        num_iterations=20,
        seed=seed,
        report_to="none",
        save_strategy="no",
        show_progress_bar=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=as_dataset(train))
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    predicted = model.predict([example.text for example in test], show_progress_bar=False)
    right = [int(p) == e.label for p, e in zip(predicted, test, strict=True)]
    return statistics.mean(right), seconds


def _head() -> object:
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    return LogisticRegression()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="folders of tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", nargs="+", default=list(SPLITS))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--test-examples", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of product.py")
    args = parser.parse_args()
    source = load_pretrained().encoder.name_or_path
    known = {(r["task"], r["seed"], r.get("name")) for r in read_rows(args.out)}
    for folder in args.data:
        for seed in args.seeds:
            task = make_task(folder, seed, SimpleNamespace(**vars(args)))
            for name in args.names:
                if (folder.name, seed, name) in known:
                    continue
                train = [e for split in SPLITS[name] for e in getattr(task, split)]
                accuracy, seconds = accuracy_of(
                    source, train, list(task.test), seed, args.max_length
                )
                row = {
                    "task": folder.name,
                    "seed": seed,
                    "name": name,
                    "accuracy": accuracy,
                    "seconds": round(seconds, 1),
                }
                print(row, flush=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
