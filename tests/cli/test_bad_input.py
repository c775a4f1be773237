"""What users, other programs and machines do to the command line: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
import json
import os
from pathlib import Path
import shlex
import shutil
import sqlite3
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
import pytest
from rich.table import Table
import torch
from transformers import AutoModel

from optuna_llm_catalyst.cli import export
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import results
from optuna_llm_catalyst.cli.journal import JournalLock
from optuna_llm_catalyst.cli.progress import StageProgress
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from tests.cli.conftest import Cli
from tests.cli.conftest import Result


STORAGE = "sqlite:///catalyst.db"
NAME = "prompt-tuning"
LONG = "x" * 300
MAIN = "from optuna_llm_catalyst.cli import main; main()"
REPOSITORY = Path(__file__).parents[2]


def process(*args: object, code: str = MAIN, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    # Not `capture_output`, so that a test can put its own stream in place.
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], text=True, env=environment, **streams
    )


def _foreign_study() -> None:
    study = optuna.create_study(storage=STORAGE, study_name=NAME)
    study.optimize(lambda trial: trial.suggest_float("x", -100, 100), n_trials=2)


def _other_version() -> None:
    optuna.create_study(storage=STORAGE, study_name=NAME)
    with closing(sqlite3.connect("catalyst.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9'")
        connection.commit()


def _foreign_database() -> None:
    with closing(sqlite3.connect("catalyst.db")) as connection:
        connection.execute("CREATE TABLE accounts (name TEXT)")
        connection.commit()


def _csv() -> None:
    Path("mine.csv").write_text("text,label\n")


def _empty_validation() -> None:
    shutil.copytree(os.environ["DATA"], "empty")
    Path("empty/validation.jsonl").write_text("")


def _nothing() -> None: ...


TUNE = ("tune", "{data}", "--model", "{model}", "--num-virtual-tokens", "3", "--stages", "1")
READ_ONLY = "sqlite:///file:{folder}/catalyst.db?mode=ro&uri=true"
ROWS: dict[str, tuple[Callable[[], None], tuple[str, ...], str]] = {
    "7 foreign study": (_foreign_study, TUNE, "trial 0 has the parameters x"),
    "23 database of another version": (_other_version, TUNE, "updating optuna to the latest"),
    "25 tokens without end": (
        _nothing,
        (*TUNE, "--num-virtual-tokens", "10" * 5),
        "or equal to 1000",
    ),
    "31 show": (_foreign_database, ("show",), "holds no study of Optuna"),
    "31 export": (_foreign_database, ("export", "out"), "holds no study of Optuna"),
    "31 meta-prompt": (_foreign_database, ("meta-prompt",), "holds no study of Optuna"),
    "32 read-only": (_foreign_study, (*TUNE, "--storage", READ_ONLY), "it is read-only"),
    "33 seed": (_nothing, (*TUNE, "--seed", "1" * 23), "'--seed'"),
    "33 learning rate": (_nothing, (*TUNE, "--lr", "1e300"), "'--lr'"),
    "learning rate of 0": (_nothing, (*TUNE, "--lr", "0"), "'--lr'"),
    "timeout of 0": (_nothing, (*TUNE, "--llm-timeout", "0"), "'--llm-timeout'"),
    "startup stages": (_nothing, (*TUNE, "--n-startup-trials", "-1"), "'--n-startup-trials'"),
    "no room for a reply": (_nothing, (*TUNE, "--num-ctx", "600"), "'--num-ctx'"),
    "33 device": (_nothing, (*TUNE, "--device", "meta"), "--device 'meta' cannot be used"),
    "33 bytes": (_nothing, (*TUNE, "--startup-prompt", "\udcff"), "--startup-prompt must be UTF"),
    "34 data": (_nothing, ("tune", LONG), "no such folder"),
    "34 artifacts": (_nothing, (*TUNE, "--artifacts", LONG), "ame too long"),
    "34 storage": (_nothing, (*TUNE, "--storage", f"{LONG}.log"), "ame too long"),
    "34 show": (_nothing, ("show", "--storage", f"sqlite:///{LONG}"), "there is no file"),
    "34 replies": (_nothing, (*TUNE, "--llm", f"replay:{LONG}"), "ame too long"),
    "36 timeout": (_nothing, (*TUNE, "--llm-timeout", "1e10"), "'--llm-timeout'"),
    "37 empty validation": (
        _empty_validation,
        ("tune", "empty"),
        "validation.jsonl: there is no example in it",
    ),
    "a file as data": (_csv, ("tune", "mine.csv"), "mine.csv: there is no example in it"),
    "unknown option": (_nothing, ("show", "--colour"), "No such option: --colour"),
    "unknown command": (_nothing, ("tun",), "No such command 'tun'"),
    "password in an argument": (
        *(_nothing, ("show", "postgresql://joe:hunter2@host/x")),
        "unexpected extra argument",
    ),
    "quote in a password": (
        *(_nothing, ("show", "postgresql://joe:hu'nter2 hunter2@host/x")),
        "unexpected extra argument",
    ),
    "quote in an option": (
        *(_nothing, ("show", "--storage=postgresql://joe:hun'ter2@127.0.0.1:9/x")),
        "***@127.0.0.1:9/x",
    ),
    "bytes in a key": (
        *(_nothing, (*TUNE, "--llm", "openai:x", "--llm-api-key", "hunter2\udcff99")),
        "--llm-api-key must be UTF-8 text",
    ),
    "4 password of a storage": (
        *(_nothing, ("show", "--storage", "postgresql://joe:hunter2@127.0.0.1:9/x")),
        "storage 'postgresql://***@127.0.0.1:9/x'",
    ),
}


@pytest.mark.parametrize(("prepare", "args", "message"), ROWS.values(), ids=ROWS.keys())
def test_one_line(
    cli: Cli,
    data: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[], None],
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("DATA", str(data))
    prepare()
    before = sorted((p.name, p.read_bytes()) for p in Path().glob("*.db"))
    result = cli(*(a.format(data=data, model=tiny_model, folder=Path.cwd()) for a in args))

    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.err and "ter2" not in result.err
    assert result.out == ""
    if before:
        assert sorted((p.name, p.read_bytes()) for p in Path().glob("*.db")) == before


MASKED = {
    "postgresql://joe:hunter2@host/db": "postgresql://***@host/db",
    "mysql+pymysql://joe:hun/ter2@host/db": "mysql+pymysql://***@host/db",
    "http://token@host:80/v1 and joe@mail": "http://***@host:80/v1 and joe@mail",
    "http://127.0.0.1:80/v1": "http://127.0.0.1:80/v1",
    "https://h/v1?api_key=hunter2&x=1": "https://h/v1?api_key=***&x=1",
    "key sk-hunter2, not xsk-hunter2": "key ***, not xsk-hunter2",
}
SECRETS = ("joe's hunter2", 'a"hunter2', "hünter2", "back\\slash hunter2", "per%cent@hunter2")


@pytest.mark.parametrize(("text", "masked"), MASKED.items())
def test_secrets_are_masked(text: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-hunter2")
    with output.guarded():
        assert output.mask(text) == masked


@pytest.mark.parametrize("secret", SECRETS)
def test_quoted_secrets_are_masked(
    secret: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lines for a shell, JSON, errors, URLs, Optuna's log and narrow tables."""
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("found")
    with output.guarded():
        output.hide_credentials(f"postgresql://joe:{secret}@host/x")
        url = f"postgresql://joe:{secret}@host/x"
        table.add_row(output.cell(f"see {url}"))
        output.say(f"{shlex.join(['run', url])} {url!r} {json.dumps(url)} {quote(secret)}")
        output.say(repr(ValueError(secret)))
        optuna.logging.get_logger("optuna.x").error(f"lost {url}")
        output.report({"storage": url, "n": [secret]}, [], as_json=True)
        output.report(None, [url, table], as_json=False)
    printed = "".join(capfd.readouterr())

    assert "nter2" not in printed and "***" in printed


@pytest.mark.parametrize("value", ["true", "null", "1000", "12345678", "complete"])
def test_ordinary_words_are_no_secrets(
    value: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_TOKEN", value)
    with output.guarded():
        output.report({"a": True, "b": None, "c": 1000, "d": 12345678}, [], as_json=True)

    assert json.loads(capfd.readouterr().out) == {"a": True, "b": None, "c": 1000, "d": 12345678}


def test_secret_in_the_report(tune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 4: neither "Next:" nor --json shows it."""
    monkeypatch.setenv("MY_TOKEN", "hunter22")
    for args in ((), ("--json",)):
        result = tune("--storage", "sqlite:///hunter22.db", "--stages", 1, *args)
        assert result.code == 0
        assert "sqlite:///***.db" in result.out and "hunter2" not in result.out + result.err


def test_key_in_the_environment(tune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24: it is for `openai:` and in nobody's way."""
    monkeypatch.setenv("LLM_CATALYST_API_KEY", "sk-hunter2")
    assert tune("--stages", 0, "--llm", "mutation").code == 0


def test_other_encodings(tune: Cli) -> None:
    """Row 20."""
    tune("--stages", 1, "--startup-prompt", "food → tool", "--study-name", "mühle ☃")
    for encoding in ("ascii", "cp1252"):
        environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "COLUMNS": "100"}
        result = process(
            *("show", "--study-name", "mühle ☃"), env={**environment, "PYTHONUTF8": "1"}
        )

        assert result.returncode == 0, result.stderr
        assert "food" in result.stdout


@pytest.mark.usefixtures("tuned")
def test_narrow_terminals(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 38."""
    for columns in ("0", "1", "20", "40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = cli("show").out
        for trial in optuna.load_study(study_name=NAME, storage=STORAGE).trials:
            assert trial.user_attrs["prompt"] in shown, columns
            assert str(trial.number) in shown, columns


@pytest.mark.parametrize("module", ["optuna", "typer", "sqlalchemy"])
def test_interrupt_while_importing(module: str) -> None:
    """Row 39."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        f"sys.meta_path.insert(0, Interrupt())\n{MAIN}"
    )
    result = process("show", code=code)

    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.usefixtures("tuned")
def test_full_disk_behind_stdout() -> None:
    """Row 39."""
    with open("/dev/full", "w") as full:
        result = process("show", stdout=full)
        lost = process("show", "--study-name", "x", stderr=full)

    assert result.returncode == 2
    assert result.stderr == "error: the report cannot be written: No space left on device.\n"
    assert lost.returncode == 2


@pytest.mark.usefixtures("tuned")
def test_closed_pipe() -> None:
    """Row 39: as in `show | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    result = process("show", stdout=writer)
    os.close(writer)

    assert (result.returncode, result.stderr) == (1, "")


def test_workers_create_a_database_at_once(tmp_path: Path) -> None:
    """Row 10: four processes, in five rounds."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from optuna_llm_catalyst.cli.studies import open_study\n"
        "Path(f'{sys.argv[1]}.ready').touch()\n"
        "while not Path('go').exists(): time.sleep(0.001)\n"
        "for i in range(5): open_study(f'sqlite:///{i}.db', 'a')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    while len(list(tmp_path.glob("*.ready"))) < len(workers):
        assert all(worker.poll() is None for worker in workers)
    (tmp_path / "go").touch()
    errors = [worker.communicate()[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0] * 4, errors


def _journal(path: str) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(path))
    return optuna.load_study(study_name=NAME, storage=storage)


@pytest.mark.parametrize("storage", ["a.log", "sub/a.log"])
def test_torn_journal_heals(tune: Cli, cli: Cli, tmp_path: Path, storage: str) -> None:
    """Row 1."""
    (tmp_path / "sub").mkdir()
    tune("--storage", storage)
    path = tmp_path / storage
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 5, "worker')
    # Reading changes nothing.
    assert len(cli("show", "--storage", storage, "--json").json["stages"]) == 2
    assert path.read_bytes() != whole
    result = tune("--storage", storage, "--stages", 1)

    assert result.code == 0
    assert result.err.count("ended in an unfinished line") == 1
    assert len(_journal(storage).trials) == 3
    assert path.read_bytes().startswith(whole)
    assert path.with_name("a.log.torn").read_bytes() == b'{"op_code": 5, "worker\n'


@pytest.mark.parametrize("target", ["sub/a.log", "{folder}/sub/a.log"])
def test_stale_lock_is_taken_over(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 2: also one whose link leads nowhere, as that of a relative path does."""
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.log"
    path.touch()
    os.symlink(target.format(folder=tmp_path), f"{path}.lock")
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 1

    lock = JournalLock(str(path), clock=lambda: now[0], sleep=sleep)
    assert lock.acquire()
    lock.release()

    assert 30 < now[0] < 35
    assert capsys.readouterr().err.count("Waiting for") == 1


def test_held_lock_is_waited_for(tmp_path: Path) -> None:
    """Row 2: a holder that makes progress keeps what it has."""
    path = tmp_path / "a.log"
    path.touch()
    holder, n_waits = JournalLock(str(path)), [0]
    holder.acquire()

    def sleep(seconds: float) -> None:
        n_waits[0] += 1
        holder.release()
        if n_waits[0] < 100:
            holder.acquire()

    lock = JournalLock(str(path), clock=lambda: n_waits[0], sleep=sleep)
    assert lock.acquire() and n_waits[0] == 100


def test_lock_that_another_waiter_took_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.log"
    path.touch()
    link = Path(f"{path}.lock")
    link.symlink_to("dead")
    now, held = [0.0], []

    def taken_over(line: str) -> None:
        link.unlink()
        link.symlink_to("other")

    def sleep(seconds: float) -> None:
        if now[0] > 0:
            held.append(os.readlink(link))
            link.unlink()
        now[0] += 40

    monkeypatch.setattr(output, "say", taken_over)
    assert JournalLock(str(path), clock=lambda: now[0], sleep=sleep).acquire()
    assert held == ["other"]


def test_somebody_elses_file_is_no_journal(tune: Cli) -> None:
    Path("notes.log").write_text("no journal")
    assert tune("--storage", "notes.log").code == 2
    assert Path("notes.log").read_text() == "no journal"


@pytest.mark.usefixtures("tuned")
def test_export_keeps_old_replies(cli: Cli) -> None:
    """Row 9."""
    Path("old.jsonl").write_text("old")
    result = cli("export", "--replies", "old.jsonl")

    assert result.code == 2
    assert "no replies to export; old.jsonl is left as it is" in result.err
    assert Path("old.jsonl").read_text() == "old"


@pytest.mark.usefixtures("tuned")
def test_devices_are_not_replaced(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 14: a full disk, and what is no file."""
    rows = [{"trial": 0, "attempt": 0, "reply": "x", "model": "y"}]
    monkeypatch.setattr(export, "reply_rows", lambda _: iter(rows))
    result = cli("export", "--replies", "/dev/full")

    assert result.code == 2
    assert result.err == "error: /dev/full cannot be written: No space left on device.\n"
    assert not Path("/dev/full").is_file()


@pytest.mark.usefixtures("tuned")
def test_junk_that_was_enqueued(tune: Cli) -> None:
    """Row 12."""
    study = optuna.load_study(study_name=NAME, storage=STORAGE)
    study.enqueue_trial({f"prompt[{i}]": 10**6 for i in range(3)})
    result = tune("--stages", 1)

    assert result.code == 2 and "Fixed parameter" not in result.err
    assert "error: this stage is lost" in result.err and "no token id" in result.err
    assert tune("--stages", 1).code == 0


def test_verbs_take_the_urls_of_tune(tune: Cli, cli: Cli) -> None:
    """Row 30."""
    storage = ("--storage", "sqlite:///q.db?timeout=60")
    for run, args in (
        (tune, ("--stages", 1)),
        (cli, ("show",)),
        (cli, ("export", "x")),
        (cli, ("meta-prompt",)),
    ):
        assert run(*args, *storage).code == 0


def _delete_study() -> None:
    optuna.delete_study(study_name=NAME, storage=STORAGE)


def _delete_file() -> None:
    Path("catalyst.db").unlink()


@pytest.mark.parametrize("delete", [_delete_study, _delete_file])
def test_study_is_deleted_under_a_worker(
    tune: Cli, monkeypatch: pytest.MonkeyPatch, delete: Callable[[], None]
) -> None:
    """Row 22."""
    pending = [delete]
    monkeypatch.setattr(StageProgress, "evaluated", lambda *_: pending and pending.pop()())
    result = tune()

    assert result.code == 2
    assert "gone" in result.err and "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize("has_room", [True, False])
def test_full_disk_behind_the_artifacts(
    tune_and_test: Cli, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """The trained prompts are tested from memory, and written elsewhere if they can be."""

    def full(*_: object) -> None:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    monkeypatch.setattr(results, "save_product", full)
    if not has_room:
        monkeypatch.setattr(PromptStore, "save_unsaved", full)
    result = tune_and_test("--json")

    files = [*Path("llm_catalyst_artifacts").glob("soft_prompts_*/*.safetensors")]
    assert result.code == 0 and result.json["test"]["chosen"]["n_examples"] == 18
    assert "objective" not in result.err
    assert "warning: the ensemble is not kept: No space left on device" in result.err
    assert [row["name"] for row in result.json["comparison"]][-1] == "fitted ensemble"
    assert len(files) == (2 if has_room else 0)
    assert has_room or not [*Path("llm_catalyst_artifacts").iterdir()]
    lost = "the soft prompts of the stages 0, 1 are lost"
    assert ("soft_prompt_of_stage_1.safetensors" if has_room else lost) in result.err
    assert all(checkpoints.read(path).prompt.is_finite() for path in files)


def test_results_come_before_an_error_of_refining(tune: Cli) -> None:
    tune("--stages", 1, "--steps", 40, "--lr", 0.1)
    result = tune("--stages", 1, "--steps", 0, "--refine-steps", 2, "--artifacts", "others")

    assert result.code == 2
    assert "Chosen by validation loss: stage 0." in result.out
    assert "this stage is lost" not in result.err and result.err.count("error: ") == 1


def test_interrupt_outweighs_failed_stages(tune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([float("nan")])

    def objective(*_: object) -> float:
        for value in values:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptTuningObjective, "__call__", objective)
    assert tune().code == 130


def test_all_stages_failed(tune: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 21."""
    monkeypatch.setattr(PromptTuningObjective, "__call__", lambda *_: float("nan"))
    result = tune()

    assert result.code == 2
    assert "error: all 2 stages of this command failed" in result.err
    assert "--lr" not in result.err


def test_cut_startup_prompt_is_said(tune: Cli) -> None:
    result = tune("--startup-prompt", "food tool animal bread", "--stages", 0)
    assert "is 1 tokens too long: the stage starts from 'food tool animal'" in result.err


def test_other_settings_are_said_and_shown(tune: Cli, cli: Cli) -> None:
    tune("--stages", 1, "--text-prompts", 0)
    assert "settings" not in cli("show").out
    result = tune("--stages", 1, "--text-prompts", 0, "--lr", 0.1, "--steps", 6)

    assert "trained with n_steps 4, lr 0.005, this command trains with n_steps 6, lr 0.1" in (
        result.err
    )
    assert "n_steps 6, lr 0.1" in " ".join(cli("show").out.split())
    assert cli("show", "--json").json["stages"][1]["settings"]["lr"] == 0.1


def test_other_weights_are_refused(tune: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Row 6."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tune("--model", folder, "--stages", 1)
    encoder = AutoModel.from_pretrained(tiny_model)
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight += 0.1
    encoder.save_pretrained(folder)
    result = tune("--model", folder)

    assert result.code == 2
    assert "model with fingerprint" in result.err


ODD = {
    "an int": 5,
    "null": "null",
    "deep": "[" * 100_000,
    "a list": "[1]",
    "candidates": json.dumps({"candidates": [{"score": "x"}]}),
    "attempts": json.dumps({"attempts": [7]}),
}


@pytest.mark.usefixtures("tuned")
def test_odd_records_are_passed_over(tune: Cli, cli: Cli) -> None:
    """Row 11: a record that cannot be read counts as absent, and is named once."""
    study = optuna.load_study(study_name=NAME, storage=STORAGE)
    first = study.trials[0]
    numbers = {case: n for n, case in enumerate(ODD, len(study.trials))}
    for chunk in ODD.values():
        study.add_trial(first)
        with closing(sqlite3.connect("catalyst.db")) as connection:
            connection.execute(
                "UPDATE trial_system_attributes SET value_json = ? WHERE trial_id = "
                "(SELECT max(trial_id) FROM trials) AND key LIKE 'llm_catalyst:%:0'",
                (json.dumps(chunk),),
            )
            connection.commit()
    for case, number in numbers.items():
        story = cli("show", "--trial", number)
        assert f"of trial {number} cannot be read and counts as absent" in story.err, case
        for shown in (story, cli("show", "--trial", number, "--json")):
            assert shown.code == 0 and first.user_attrs["prompt"] in shown.out, (case, shown.err)
            assert _says_each_line_once(shown), (case, shown.err)
    for result in (cli("show"), tune("--stages", 1, "--n-startup-trials", 1)):
        assert result.code == 0
        assert _says_each_line_once(result), result.err


def _says_each_line_once(result: Result) -> bool:
    lines = result.err.splitlines()
    return len(lines) == len(set(lines))


def test_remote_code_is_not_run(tune: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Row 15: nothing is read from stdin, either."""
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.Config"}}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    result = tune("--model", folder)

    assert result.code == 2
    assert "it ran" not in result.err and "y/N" not in result.out
