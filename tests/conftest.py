from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
import logging
import os
from pathlib import Path
from typing import Any

from hypothesis import settings
from optuna.storages import BaseStorage
from optuna.storages import get_storage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine


# Examples are timed by the machine's other work as well: no deadline for one of them. Where `CI`
# is set they are the same each time; elsewhere each run draws new ones.
settings.register_profile("house", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.load_profile("house")


@event.listens_for(Engine, "connect")
def _do_not_wait_for_the_disk(connection: Any, _: Any) -> None:
    """A test's file need not survive a power cut: waiting is most of a short trial."""
    connection.execute("PRAGMA synchronous = OFF")


@contextmanager
def sqlite_storage(path: Path) -> Iterator[BaseStorage]:
    """The storage as optuna makes it from a URL, closed at the end."""
    storage = get_storage(f"sqlite:///{path}")
    try:
        yield storage
    finally:
        storage.remove_session()
        backend = storage._backend
        assert isinstance(backend, RDBStorage)
        backend.engine.dispose()


@contextmanager
def logged(name: str, level: int = logging.WARNING) -> Iterator[list[str]]:
    """The lines that a user would see of a logger, in their order."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(level)
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture(params=["in_memory", "sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    """Every kind of storage that optuna keeps a study in."""
    with ExitStack() as stack:
        if request.param == "in_memory":
            yield InMemoryStorage()
        elif request.param == "journal":
            yield JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
        else:
            yield stack.enter_context(sqlite_storage(tmp_path / "study.db"))
