from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
from pathlib import Path
import sqlite3

from huggingface_hub import constants
import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import RDBStorage
import pytest
import torch

from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

from .tiny import make_encoder


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """One, unless asked: tiny models only wait for their threads, the more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("LLM_CATALYST_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Callable[[], RDBStorage]]:
    """A function that opens the test's one SQLite file again, as another process would."""
    path = tmp_path / "study.db"
    opened: list[RDBStorage] = []

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=60, check_same_thread=False)

    def open_storage() -> RDBStorage:
        opened.append(RDBStorage(f"sqlite:///{path}", engine_kwargs={"creator": connect}))
        return opened[-1]

    yield open_storage
    for storage in opened:
        storage.remove_session()
        storage.engine.dispose()


@pytest.fixture(params=["in_memory", "sqlite"])
def storage(request: pytest.FixtureRequest) -> BaseStorage:
    if request.param == "in_memory":
        return InMemoryStorage()
    open_storage: Callable[[], RDBStorage] = request.getfixturevalue("sqlite")
    return open_storage()


@pytest.fixture
def study(storage: BaseStorage) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(storage=storage, sampler=sampler)


@pytest.fixture
def store(tmp_path: Path) -> FileSystemArtifactStore:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    return FileSystemArtifactStore(base_path=str(folder))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny encoder, as `load_pretrained` takes it."""
    folder = tmp_path_factory.mktemp("model")
    for part in make_encoder():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and an empty cache of it, whatever the machine has."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """The real all-MiniLM-L6-v2, as the installed package carries it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        return load_pretrained()
