from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from pathlib import Path

from hypothesis import settings
from optuna.storages import BaseStorage
from optuna.storages import get_storage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
import pytest


# Examples are timed by the machine's other work as well: no deadline for one of them.
settings.register_profile("house", deadline=None, max_examples=50)
settings.load_profile("house")


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
