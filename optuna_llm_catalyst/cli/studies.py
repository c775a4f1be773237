"""Opening studies, and what must not change when one is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError

from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import StudyMismatchError


_SETUP = "llm_catalyst:setup"


def open_study(storage: str, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """Creates a study, or loads it if it is there."""

    def create(opened: BaseStorage) -> optuna.Study:
        # Stages that start elsewhere say nothing about each other: no pruning by default.
        return optuna.create_study(
            storage=opened,
            study_name=name,
            load_if_exists=True,
            direction="minimize",
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
        )

    study = _with_storage(storage, create)
    if study.directions != [StudyDirection.MINIMIZE]:
        raise UserError(
            f"study {name!r} does not minimize one value, as tuning does: choose another "
            "--study-name."
        )
    return study


def load_study(storage: str, name: str) -> optuna.Study:
    """Loads a study that must be there, from a storage that must be there."""
    path = _sqlite_path(storage) or (Path(storage) if _is_journal(storage) else None)
    if path is not None and not path.exists():
        raise UserError(f"storage {storage!r}: there is no file {path}.")

    def load(opened: BaseStorage) -> optuna.Study:
        try:
            return optuna.load_study(storage=opened, study_name=name)
        except KeyError as error:
            names = ", ".join(map(repr, optuna.get_all_study_names(opened))) or "none"
            raise UserError(
                f"storage {storage!r} has no study {name!r}; it has: {names}."
            ) from error

    study = _with_storage(storage, load)
    if len(study.directions) != 1:
        raise UserError(f"study {name!r} has several objectives: it is none of prompt tuning.")
    return study


def check_setup(study: optuna.Study, setup: dict[str, Any]) -> None:
    """Keeps what makes a study's values comparable, and refuses to resume with another.

    Written once, by the process that opens the study, never from inside a trial.
    """
    known = study.user_attrs.get(_SETUP)
    if known is None:
        study.set_user_attr(_SETUP, setup)
        return
    for key, value in setup.items():
        if known.get(key) != value:
            raise StudyMismatchError(
                f"study {study.study_name!r} was made with {key} {known.get(key)!r}, this command "
                f"has {value!r}: repeat it, or choose another --study-name."
            )


def _with_storage(storage: str, use: Callable[[BaseStorage], optuna.Study]) -> optuna.Study:
    try:
        if _is_journal(storage):
            return use(JournalStorage(JournalFileBackend(storage)))
        if "://" not in storage:
            raise UserError(
                f"storage {storage!r} is neither a URL such as sqlite:///catalyst.db nor a path "
                "ending in .log."
            )
        return use(optuna.storages.get_storage(storage))
    # A journal that is none raises a ValueError of JSON.
    except (SQLAlchemyError, StorageInternalError, ImportError, OSError, ValueError) as error:
        raise UserError(f"storage {storage!r} cannot be opened: {first_line(error)}") from error


def _is_journal(storage: str) -> bool:
    return "://" not in storage and storage.endswith(".log")


def _sqlite_path(storage: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(storage.removeprefix(prefix)) if storage.startswith(prefix) else None
