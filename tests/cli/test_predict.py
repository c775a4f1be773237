"""`predict`: rows in, rows out, in batches; and `export` before it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import threading
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest

from optuna_llm_catalyst.cli import predict
from optuna_llm_catalyst.cli.text_rows import Columns
from optuna_llm_catalyst.cli.text_rows import json_rows
from optuna_llm_catalyst.cli.text_rows import TextRow
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import MAIN
from tests.cli.test_bad_input import REPOSITORY
from tests.prompt_tuning.tiny import LABELS
from tests.prompt_tuning.tiny import make_examples
from tests.prompt_tuning.tiny import make_objective


TEXTS = [example.text for example in make_examples(9, seed=4)]
PAIRS = [(e.text, e.text_pair) for e in make_examples(3, seed=4, pairs=True)]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `export` writes it, of two stages that `tune` would run."""
    return exported(tiny_model, tmp_path_factory.mktemp("exported"))


def exported(tiny_model: Path, folder: Path, **options: Any) -> Path:
    model = DualEncoderClassifier(load_pretrained(str(tiny_model)), LABELS, max_virtual_tokens=8)
    (folder / "artifacts").mkdir()
    store = FileSystemArtifactStore(base_path=str(folder / "artifacts"))
    objective = make_objective(store=store, model=model)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=2)
    made = objective.classifier(study)
    PromptClassifier(model, made.ensemble, **options).export(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> PromptClassifier:
    return load_classifier(folder)


@pytest.fixture
def piped(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`predict` of the folder, with the first argument at its standard input."""

    def call(given: str | bytes, *args: object) -> Any:
        content = given.encode() if isinstance(given, str) else given
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return cli("predict", folder, *args)

    return call


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def assert_predicted(out: str, texts: Any, classifier: PromptClassifier) -> None:
    """One row a text, as the classifier has it."""
    found, probabilities = rows(out), classifier.predict_proba(texts)
    assert [row["label"] for row in found] == classifier.predict(texts).tolist()
    expected = pytest.approx(probabilities.max(1).tolist(), abs=1e-5)
    assert [row["probability"] for row in found] == expected


def json_lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# What is read.


INPUTS: dict[str, Callable[[list[str]], str]] = {
    "objects": lambda texts: json_lines(*({"text": text, "label": "x"} for text in texts)),
    "texts": lambda texts: json_lines(*texts),
    "both, with blank lines": lambda texts: (
        json_lines(texts[0]) + "\n  \n" + json_lines(*({"text": text} for text in texts[1:]))
    ),
    "no line end": lambda texts: json_lines(*texts).rstrip("\n"),
    "Windows": lambda texts: "\ufeff" + json_lines(*texts).replace("\n", "\r\n"),
    "null for a pair": lambda texts: json_lines(
        *({"text": text, "text_pair": None} for text in texts)
    ),
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_each_row_gets_a_row(
    case: str, batch_size: int, piped: Cli, classifier: PromptClassifier
) -> None:
    result = piped(INPUTS[case](TEXTS), "--batch-size", batch_size)
    assert (result.code, result.err) == (0, "")
    assert_predicted(result.out, TEXTS, classifier)
    assert all(set(row) == {"label", "probability"} for row in rows(result.out))


FILES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "CSV": ("a.csv", 'text,label\nnew wolf,x\n"bread, ""over""\nmade",y\n', ()),
    "semicolons": ("a.csv", 'label;text\nx;new wolf\ny;"bread, ""over""\nmade"\n', ()),
    "TSV": ("a.TSV", 'text\tlabel\nnew wolf\tx\n"bread, ""over""\nmade"\ty\n', ()),
    "blank lines": ("a.csv", 'text\n\nnew wolf\n\n"bread, ""over""\nmade"\n\n', ()),
    "another column": (
        *("a.csv", 'title,text\nnew wolf,x\n"bread, ""over""\nmade",y\n'),
        ("--text-column", "title"),
    ),
    "JSON": (
        *("a.jsonl", json_lines({"title": "new wolf"}, {"title": 'bread, "over"\nmade'})),
        ("--text-column", "title"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_read(case: str, cli: Cli, folder: Path, classifier: PromptClassifier) -> None:
    name, content, args = FILES[case]
    Path(name).write_text(content)
    result = cli("predict", folder, "--input", name, *args)
    assert (result.code, result.err) == (0, "")
    assert_predicted(result.out, ["new wolf", 'bread, "over"\nmade'], classifier)


def test_texts_of_the_command_line(cli: Cli, folder: Path, classifier: PromptClassifier) -> None:
    result = cli("predict", folder, "--text", "new wolf", "--text", "bread")
    assert result.code == 0
    assert_predicted(result.out, ["new wolf", "bread"], classifier)


def test_pairs_are_read(piped: Cli, cli: Cli, folder: Path, classifier: PromptClassifier) -> None:
    given = json_lines(*({"a": first, "b": second} for first, second in PAIRS))
    by_name = piped(given, "--text-column", "a", "--text-pair-column", "b")
    Path("a.csv").write_text("text,text_pair\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    for result in (by_name, cli("predict", folder, "--input", "a.csv")):
        assert result.code == 0
        assert_predicted(result.out, PAIRS, classifier)


def test_an_id_is_kept_and_all_probabilities_are_told(
    piped: Cli, classifier: PromptClassifier
) -> None:
    given = [{"id": name, "text": text} for name, text in zip((7, "x", [1]), TEXTS, strict=False)]
    found = rows(piped(json_lines(*given), "--proba").out)
    assert [row["id"] for row in found] == [7, "x", [1]]
    for row, expected in zip(found, classifier.predict_proba(TEXTS[:3]), strict=True):
        assert list(row["probabilities"]) == classifier.classes_.tolist()
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())


def test_nothing_gives_nothing(piped: Cli) -> None:
    Path("a.csv").touch()
    for result in (piped(""), piped("\n\n"), piped("", "--input", "a.csv")):
        assert (result.code, result.out, result.err) == (0, "", "")


# What is refused, after what came before it.


GOOD = json_lines({"text": "new wolf"})
BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ("a plain text\n", "not a row of JSON: Expecting value"),
    "a number": ("3\n", "a row must be an object or a text, got 3."),
    "a list": ('["a", "b"]\n', 'a row must be an object or a text, got ["a", "b"].'),
    "no text": (json_lines({"id": 1}), "there is no 'text': name another with --text-column."),
    "a number for a text": (json_lines({"text": 5}), "its text is 5, of type int"),
    "an empty text": (json_lines({"text": " "}), "its text is empty"),
    "an empty plain text": ('""\n', "its text is empty"),
    "a pair": (json_lines({"text": "a", "text_pair": "b"}), "it is a pair of texts, but single"),
    "half a pair": (json_lines({"text": "a", "text_pair": 3}), "its text is ('a', 3)"),
    "half a character": ('{"text": "\\ud83d"}\n', "its text has half a character"),
    "bytes": (b'{"text": "\xff"}\n', "cannot be read: 'utf-8' codec"),
    "deep": ("[" * 100_000 + "\n", "not a row of JSON"),
    "a long line": (json_lines(["x" * 5_000]), 'a row must be an object or a text, got ["xxx'),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(case: str, piped: Cli) -> None:
    bad, message = BAD_ROWS[case]
    content = bad.encode() if isinstance(bad, str) else bad
    result = piped(3 * GOOD.encode() + b"\n" + content + GOOD.encode(), "--batch-size", 2)
    assert result.code == 2
    assert len(rows(result.out)) == 3
    [line] = result.err.splitlines()
    assert line.startswith(f"error: stdin:5: {message}")
    assert len(line) < 300


BAD_FILES: dict[str, tuple[str, str, str]] = {
    "no such column": ("a.csv", "title\nx\n", "a.csv:1: there is no column 'text', only 'title'"),
    "a value too many": ("a.csv", "text,id\na,1\nb,2,3\n", "a.csv:3: 3 values for the 2 columns"),
    "a quote that stays open": (
        "a.csv",
        'text\na\n"b\nc\n',
        "a.csv:3: cannot be read: unexpected",
    ),
    "a quote in the middle": ("a.tsv", 'text\tid\n"a"b\t1\n', "a.tsv:2: cannot be read: '\\t'"),
    "an empty cell": ("a.csv", "text,id\na,1\n,2\n", "a.csv:3: its text is empty"),
    "a long cell": ("a.csv", "text\n" + "x" * 200_000 + "\n", "a.csv:2: cannot be read: field"),
    "pairs and others": (
        *("a.csv", "text,text_pair\na,b\nc,\n"),
        "a.csv:3: it is a single text, but pairs of texts are read",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_by_its_line(case: str, cli: Cli, folder: Path) -> None:
    name, content, message = BAD_FILES[case]
    Path(name).write_text(content)
    result = cli("predict", folder, "--input", name)
    assert result.code == 2
    [line] = result.err.splitlines()
    assert line.startswith(f"error: {message}")


FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no folder": (("predict", "nowhere"), "nowhere: no safetensors file: "),
    "another folder": (("predict", "."), "classifier.safetensors: no safetensors file"),
    "no file": (("predict", "{folder}", "--input", "a.csv"), "a.csv: No such file"),
    "a folder for a file": (("predict", "{folder}", "--input", "."), ".: Is a directory"),
    "both": (("predict", "{folder}", "--text", "a", "--input", "a"), "not both"),
    "an empty text": (("predict", "{folder}", "--text", " "), "--text is empty"),
    "no batch": (("predict", "{folder}", "--batch-size", "0"), "'--batch-size'"),
    "another device": (
        *(("predict", "{folder}", "--text", "a", "--device", "meta"),),
        "The device 'meta' cannot be used",
    ),
    "another model": (
        *(("predict", "{folder}", "--text", "a", "--model", "no such model!"),),
        "is neither a folder nor a name",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_mistake_is_one_line(case: str, cli: Cli, folder: Path) -> None:
    args, message = FAULTS[case]
    result = cli(*(arg.format(folder=folder) for arg in args))
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_single_texts_for_a_classifier_of_pairs(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    folder = exported(tiny_model, tmp_path, reads_pairs=True)
    result = cli("predict", folder, "--text", "a")
    assert result.code == 2
    assert "--text: it is a single text, but pairs of texts are read" in result.err


# Streams.


def test_input_without_end_is_read_in_batches(classifier: PromptClassifier) -> None:
    """As many rows are read as the batches that were taken need."""
    n_read = 0

    def lines() -> Iterator[bytes]:
        nonlocal n_read
        while True:
            n_read += 1
            yield b'"new wolf"\n'

    read: Iterator[TextRow] = json_rows(lines(), "x", Columns("text", "text_pair"))
    batches = predict._batches(predict._alike(read, None), 5)
    for _ in range(3):
        batch = next(batches)
        assert len(list(predict._predictions(classifier, batch, with_all=False))) == 5
    assert n_read == 15


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "predict", str(folder), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_each_batch_is_written_at_once_and_a_closed_pipe_ends_it(
    folder: Path, classifier: PromptClassifier
) -> None:
    """As in `yes … | predict | head -2`: the rows come before the input ends."""
    with start(folder, "--batch-size", "2") as command:
        # Rows that do not come would be waited for without end.
        timer = threading.Timer(300, command.kill)
        timer.start()
        assert command.stdin and command.stdout and command.stderr
        command.stdin.write(GOOD * 2)
        command.stdin.flush()
        assert_predicted(
            "".join(command.stdout.readline() for _ in range(2)), ["new wolf"] * 2, classifier
        )
        command.stdout.close()
        command.stdin.write(GOOD * 2)
        command.stdin.close()
        assert command.stderr.read() == ""
        assert command.wait() == 1
        timer.cancel()


# From tune to predict.


@pytest.mark.parametrize("kind", ["dual-encoder", "sequence-classifier"])
def test_what_export_writes_predicts(tune: Cli, cli: Cli, tmp_path: Path, kind: str) -> None:
    tune("--model-type", kind)
    document = cli("export", "out", "--json").json
    study = optuna.load_study(study_name="prompt-tuning", storage="sqlite:///catalyst.db")
    assert document["stages"] == [0, 1]
    assert document["is_fitted"] == (kind == "dual-encoder")
    assert [Path(file).name for file in document["files"][:2]] == [
        *("classifier.safetensors", "README.md"),
    ]
    result = cli("predict", "out", *(arg for text in TEXTS for arg in ("--text", text)))
    assert_predicted(result.out, TEXTS, load_classifier(study))
