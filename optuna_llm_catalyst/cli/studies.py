"""Opening studies, and what must not change when one is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import os
from pathlib import Path
from typing import Any
from typing import Literal

import optuna
from optuna.exceptions import StorageInternalError
import sqlalchemy
import tenacity

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.journal import open_journal
from optuna_llm_catalyst.cli.output import UserError
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import StudyMismatchError


Direction = Literal["minimize", "maximize"]

_SETUP = "llm_catalyst:setup"
_STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, OSError)
#: What databases say when several processes create their tables at once.
_RACES = ("already exists", "database is locked", "UNIQUE constraint")


def open_study(
    storage: str, name: str, *, metric: str = "loss", direction: Direction = "minimize"
) -> optuna.Study:
    """Creates a study of a metric, or loads it if it is there."""
    with storage_errors(storage):
        study = _create(storage, name, direction)
    if [found.name.lower() for found in study.directions] != [direction]:
        raise UserError(
            f"study {name!r} does not {direction} one value, as --metric {metric} does: give the "
            "--metric of the study, or choose another --study-name."
        )
    return study


# Workers that start at once create the same tables; all but one fail, and find them then.
@tenacity.retry(
    retry=tenacity.retry_if_exception(lambda error: any(race in _said(error) for race in _RACES)),
    stop=tenacity.stop_after_attempt(20),
    wait=tenacity.wait_fixed(0.1),
    reraise=True,
)
def _create(storage: str, name: str, direction: Direction) -> optuna.Study:
    return optuna.create_study(
        storage=_opened(storage, creates=True),
        study_name=name,
        load_if_exists=True,
        direction=direction,
    )


def load_study(storage: str, name: str) -> optuna.Study:
    """Loads a study that must be there, and creates nothing: neither a file nor a table."""
    with storage_errors(storage):
        missing = _missing_file(storage)
        if missing:
            raise UserError(f"storage {storage!r}: there is no file {missing}.")
        opened = _opened(storage, creates=False)
        names = optuna.get_all_study_names(opened)
        if name not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise UserError(f"storage {storage!r} has no study {name!r}; it has: {known}.")
        study = optuna.load_study(storage=opened, study_name=name)
    if len(study.directions) != 1:
        raise UserError(f"study {name!r} has several objectives, prompt tuning has one.")
    return study


def check_ours(study: optuna.Study, param_names: Sequence[str]) -> None:
    """Refuses a study of something else, whose values mean something else."""
    for trial in records.all_trials(study):
        if trial.state in records.FINISHED and not set(param_names) & trial.params.keys():
            raise StudyMismatchError(
                f"study {study.study_name!r} is not one of prompt tuning: trial {trial.number} "
                f"has the parameters {', '.join(trial.params) or 'none'}. Choose another "
                "--study-name."
            )


def check_setup(study: optuna.Study, setup: dict[str, Any]) -> None:
    """Keeps what makes a study's values comparable, and refuses to resume with another.

    Written by the process that opens the study, never from inside a trial.
    """
    saved = study.user_attrs.get(_SETUP)
    known = saved if isinstance(saved, dict) else {}
    for key, value in setup.items():
        if known.get(key, value) != value:
            raise StudyMismatchError(
                f"study {study.study_name!r} was made with {key} {known[key]!r}, this command "
                f"has {value!r}: repeat it, or choose another --study-name."
            )
    if not setup.items() <= known.items():
        study.set_user_attr(_SETUP, {**known, **setup})


def made_with(storage: str, name: str, key: str) -> Any:
    """What a study was made with; None if there is no such study, or none that can be read."""
    try:
        study = load_study(storage, name)
        with storage_errors(storage, study):
            saved = study.user_attrs.get(_SETUP)
    except CatalystError:  # Whoever opens the study for good says what is wrong.
        return None
    return saved.get(key) if isinstance(saved, dict) else None


@contextmanager
def storage_errors(storage: str, study: optuna.Study | None = None) -> Iterator[None]:
    """Turns what storages raise into one line that names the storage, the cause and the fix.

    There is no ``study`` while one is being opened.
    """
    # Of tables of another version, of a missing driver, of a journal that cannot be read.
    of_opening = (RuntimeError, ImportError, ValueError) if study is None else ()
    try:
        yield
    except CatalystError:
        raise
    except Exception as error:
        # What Optuna raises when its study is gone depends on where it notices.
        if study is not None and _is_gone(storage, study):
            raise UserError(
                f"storage {storage!r}: it or its study is gone, somebody deleted it."
            ) from error
        if not isinstance(error, (*_STORAGE_ERRORS, *of_opening)):
            raise
        lost = "" if study is None else " This stage is lost, those before it are kept."
        raise UserError(f"storage {storage!r}: {_cause(error)}.{lost}") from error


def _cause(error: Exception) -> str:
    # Optuna says of any error of a database that it may be due to invalid data.
    if isinstance(error, StorageInternalError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = first_line(error).rstrip(".")
    if "readonly database" in said:
        return "it is read-only: make it writable, or choose another --storage"
    if "no such table" in said:
        return "this database holds no study of Optuna"
    return f"it cannot be used: {said}"


def _said(error: BaseException) -> str:
    return f"{error} {error.__cause__}" if isinstance(error, _STORAGE_ERRORS) else ""


def _is_gone(storage: str, study: optuna.Study) -> bool:
    if _missing_file(storage):
        return True  # What is still open of a file that was removed can be read.
    try:
        study.user_attrs  # noqa: B018
    except KeyError:
        return True
    except _STORAGE_ERRORS as error:
        # SQLite makes an empty file in place of one that was removed.
        return "no such table" in _said(error)
    return False


def _opened(storage: str, *, creates: bool) -> optuna.storages.BaseStorage:
    url = _url(storage)
    if url is None:
        return open_journal(Path(storage))
    output.hide(url.password)
    return optuna.storages.RDBStorage(storage, skip_table_creation=not creates)


def _url(storage: str) -> sqlalchemy.engine.URL | None:
    """The URL of a storage; None for a journal, which is a path."""
    if "://" not in storage and storage.endswith(".log"):
        return None
    try:
        return sqlalchemy.engine.make_url(storage)
    except sqlalchemy.exc.ArgumentError as error:
        raise UserError(
            f"storage {storage!r} is neither a URL such as sqlite:///catalyst.db nor a path "
            "ending in .log."
        ) from error


def _missing_file(storage: str) -> str | None:
    """The file of a storage if it has one that is not there."""
    url = _url(storage)
    path = storage if url is None else url.database or ":memory:"
    # SQLite's own URLs, such as file:a.db?mode=ro, and databases in memory have no plain path.
    if url and (url.get_backend_name() != "sqlite" or path.startswith(("file:", ":memory:"))):
        return None
    return None if os.path.exists(path) else path
