"""``predict``: texts in, a row of JSON with the label of each out, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from pathlib import Path
import sys
from typing import Any
from typing import BinaryIO

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.options import PredictOptions
from optuna_llm_catalyst.cli.text_rows import Columns
from optuna_llm_catalyst.cli.text_rows import json_rows
from optuna_llm_catalyst.cli.text_rows import table_rows
from optuna_llm_catalyst.cli.text_rows import TextRow
from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from optuna_llm_catalyst.prompt_tuning.data.images import check_image
from optuna_llm_catalyst.prompt_tuning.models import reads_images
from optuna_llm_catalyst.prompt_tuning.text_inputs import check_pair
from optuna_llm_catalyst.prompt_tuning.text_inputs import read_text


#: What stands between the values of a table, by the suffix of its file.
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}


def run(options: PredictOptions) -> None:
    """Prints the label of each text and its probability."""
    if options.text and options.input is not None:
        raise output.UserError("give texts with --text or with --input, not both.")
    with _opened(options) as file:
        # Before the model is loaded: a mistake of the user's is told at once.
        rows = _given(options.text) if options.text else _read(file, options)
        classifier = load_classifier(
            options.folder,
            device=options.device,
            model=options.model or None,
            trust_remote_code=options.trust_remote_code,
        )
        rows = _alike(rows, classifier.reads_pairs)
        if reads_images(classifier.model):
            rows = _of_images(rows)
        for batch in _batches(rows, options.batch_size):
            for row in _predictions(classifier, batch, with_all=options.proba):
                output.report(row, (), as_json=True)
            sys.stdout.flush()


def _given(texts: Sequence[str]) -> Iterator[TextRow]:
    return iter([TextRow("--text", read_text(text, "--text"), {}) for text in texts])


def _opened(options: PredictOptions) -> AbstractContextManager[BinaryIO]:
    if options.input is not None:
        return options.input.open("rb")
    if not options.text and sys.stdin.isatty():
        output.say('Reading rows such as {"text": "…"} from the terminal; Ctrl-D ends them.')
    return nullcontext(sys.stdin.buffer)


def _read(file: BinaryIO, options: PredictOptions) -> Iterator[TextRow]:
    columns = Columns(options.text_column, options.text_pair_column)
    path = options.input or Path("stdin")
    delimiters = _DELIMITERS.get(path.suffix.lower())
    if delimiters is None:
        return json_rows(file, str(path), columns)
    return table_rows(file, str(path), columns, delimiters)


def _alike(rows: Iterator[TextRow], pairs: bool | None) -> Iterator[TextRow]:
    """The rows, checked for being all pairs or all single texts; the first decides if need be."""
    for row in rows:
        pairs = row.example.text_pair is not None if pairs is None else pairs
        try:
            check_pair(row.example, "it", pairs=pairs)
        except ValueError as error:
            raise output.UserError(f"{row.where}: {error}") from error
        yield row


def _of_images(rows: Iterator[TextRow]) -> Iterator[TextRow]:
    """The rows, checked for naming images."""
    for row in rows:
        try:
            check_image(row.example.text)
        except DataError as error:
            raise output.UserError(f"{row.where}: {error}") from error
        yield row


def _batches(rows: Iterator[TextRow], size: int) -> Iterator[list[TextRow]]:
    """The rows in batches. What came before a bad row is a batch, too; then it is raised."""
    batch: list[TextRow] = []
    problem = None
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
    except output.UserError as error:
        problem = error
    if batch:
        yield batch
    if problem is not None:
        raise problem


def _predictions(
    classifier: PromptClassifier, batch: Sequence[TextRow], *, with_all: bool
) -> Iterator[dict[str, Any]]:
    """The rows that are printed for a batch."""
    labels = classifier.classes_.tolist()
    texts = [row.text for row in batch]
    for row, found in zip(batch, classifier.predict_proba(texts).tolist(), strict=True):
        best = max(range(len(labels)), key=found.__getitem__)
        rest = {"probabilities": dict(zip(labels, found, strict=True))} if with_all else {}
        yield {**row.kept, "label": labels[best], "probability": found[best], **rest}
