"""Files of classifiers: read as they were written, refused where they are not ours or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from optuna_llm_catalyst.prompt_tuning import PromptEnsemble
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierFacts
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.classifier_files import read
from optuna_llm_catalyst.prompt_tuning.classifier_files import write
from optuna_llm_catalyst.prompt_tuning.ensemble import Group
from optuna_llm_catalyst.prompt_tuning.ensemble import Member
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.model_card import model_card
from optuna_llm_catalyst.prompt_tuning.models import SOFT

from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_sequence


METADATA = "llm_catalyst_classifier"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_up(**facts: Any) -> ClassifierState:
    """Two groups: one of two stages on plain texts, one of a stage behind a text prompt."""
    text_prompt = Prompt(SOFT, {"texts": random(1, 2, 32, seed=3)})
    members = [Member(n, Prompt(SOFT, {"labels": random(1, 2, 32, seed=n)})) for n in (4, 1, 7)]
    groups = (
        Group(None, tuple(members[:2]), 2 / 3, Readout(random(3, 32, seed=8), 1 / 0.03)),
        Group(text_prompt, tuple(members[2:]), 1 / 3, Readout(random(3, 32), 20.0, random(3))),
    )
    fingerprint = make_dual().fingerprint
    settings = {"temperature": 0.05, "max_length": None, "max_virtual_tokens": 8}
    known = {"reads_pairs": False, "table": "| a |", "versions": {"torch": "2"}} | facts
    return ClassifierState(
        PromptEnsemble(groups, LABELS, "bert", fingerprint),
        ClassifierFacts("DualEncoderClassifier", settings, **known),
    )


def with_heads() -> ClassifierState:
    """One group of two stages that have heads."""
    tensors = {
        "texts": random(1, 2, 32),
        "head.weight": random(1, 3, 32),
        "head.bias": random(1, 3),
    }
    members = tuple(Member(number, Prompt(SOFT, tensors)) for number in (0, 1))
    found = PromptEnsemble(
        (Group(None, members, 1.0),), LABELS, "bert", make_sequence().fingerprint
    )
    settings = {"max_length": 128, "max_virtual_tokens": 8}
    return ClassifierState(found, ClassifierFacts("SequenceClassifier", settings))


STATES = {"readouts": made_up, "heads": with_heads}


@pytest.mark.parametrize("kind", STATES)
def test_a_classifier_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    state = STATES[kind]()
    write(state, tmp_path / "file")
    found = read(tmp_path / "file")
    assert found.facts == state.facts
    for name in ("labels", "model_name", "fingerprint", "numbers"):
        assert getattr(found.ensemble, name) == getattr(state.ensemble, name)
    for one, two in zip(found.ensemble.groups, state.ensemble.groups, strict=True):
        assert one.weight == two.weight
        assert [member.number for member in one.members] == [m.number for m in two.members]
        prompts = [(a.prompt, b.prompt) for a, b in zip(one.members, two.members, strict=True)]
        if two.text_prompt is not None:
            assert one.text_prompt is not None
            prompts.append((one.text_prompt, two.text_prompt))
        for a, b in prompts:
            assert a.kind == b.kind and a.tensors.keys() == b.tensors.keys()
            assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
        if two.readout is not None:
            assert one.readout is not None and one.readout.scale == two.readout.scale
            assert torch.equal(one.readout.weights, two.readout.weights)
            assert (one.readout.bias is None) == (two.readout.bias is None)
            if one.readout.bias is not None and two.readout.bias is not None:
                assert torch.equal(one.readout.bias, two.readout.bias)


def test_the_same_classifier_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(made_up(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert b"pickle" not in (tmp_path / "one").read_bytes()


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """The new one is written beside it, which fails, as a full disk would."""
    write(made_up(), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    broken = made_up()
    [first, *others] = broken.ensemble.groups
    lazy = replace(first, readout=Readout(torch.empty(3, 32).to_sparse(), 1.0))
    broken = replace(broken, ensemble=replace(broken.ensemble, groups=(lazy, *others)))
    with pytest.raises(Exception, match="."):
        write(broken, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


# Files that are not ours, or not whole.


def tensors_changed(**changes: Tensor | None) -> Callable[[Path], None]:
    """The file with some tensors replaced, added, or left out; `__` stands for a dot."""

    def spoil(path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name, tensor in changes.items():
            key = name.replace("__", ".")
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = tensor
        save_file(tensors, str(path), metadata=metadata)

    return spoil


def metadata_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA])
        changed = change(metadata)
        text = changed if isinstance(changed, str) else json.dumps(metadata)
        save_file(load_file(path), str(path), metadata={METADATA: text})

    return spoil


def with_entry(*keys: str | int, value: Any) -> Callable[[Path], None]:
    """The file with one entry of its metadata replaced."""

    def change(metadata: Any) -> None:
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata[keys[-1]] = value

    return metadata_changed(change)


NAN, ONE = torch.full((3, 32), torch.nan), torch.ones(1)
SPOILERS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut_in_its_header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "of_another_kind_of_file": lambda path: path.write_text("not a tensor in sight"),
    "a_pickle": lambda path: torch.save({"a": ONE}, path),
    "gone": lambda path: path.unlink(),
    "foreign": lambda path: save_file({"a": ONE}, str(path)),
    "a_soft_prompt": lambda path: save_file({"texts": ONE}, str(path), {"llm_catalyst": "{}"}),
    "no_json": metadata_changed(lambda _: "{oops"),
    "a_list": metadata_changed(lambda _: "[1]"),
    "deep": metadata_changed(lambda _: "[" * 100_000),
    "without_facts": metadata_changed(lambda found: found.pop("facts") and None),
    "of_a_later_format": with_entry("format", value="2"),
    "a_number_for_a_format": with_entry("format", value=1),
    "no_labels": with_entry("labels", value=[]),
    "one_label": with_entry("labels", value=["a"]),
    "labels_of_one_name": with_entry("labels", value=["a", "a", "b"]),
    "labels_that_are_numbers": with_entry("labels", value=[1, 2, 3]),
    "a_label_more": with_entry("labels", value=["a", "b", "c", "d"]),
    "no_groups": with_entry("groups", value=[]),
    "a_group_less": metadata_changed(lambda found: found["groups"].pop() and None),
    "no_members": with_entry("groups", 0, "members", value=[]),
    "a_member_twice": with_entry("groups", 0, "members", 0, "number", value=7),
    "a_member_below_zero": with_entry("groups", 0, "members", 0, "number", value=-4),
    "another_member": with_entry("groups", 0, "members", 0, "number", value=9),
    "an_unknown_kind": with_entry("groups", 0, "members", 0, "kind", value="sOft"),
    "a_text_prompt_that_is_not_there": with_entry("groups", 0, "text_prompt", value="soft"),
    "a_text_prompt_that_is_not_told": with_entry("groups", 1, "text_prompt", value=None),
    "a_readout_that_is_not_told": with_entry("groups", 1, "scale", value=None),
    "a_bias_that_is_not_told": with_entry("groups", 1, "has_bias", value=False),
    "a_bias_that_is_not_there": tensors_changed(**{"1__bias": None}),
    "a_bias_of_two_labels": tensors_changed(**{"1__bias": torch.ones(2)}),
    "a_matrix_for_a_bias": tensors_changed(**{"1__bias": torch.ones(3, 1)}),
    "a_weight_of_zero": with_entry("groups", 0, "weight", value=0.0),
    "weights_that_do_not_sum_to_one": with_entry("groups", 0, "weight", value=0.5),
    "an_infinite_scale": with_entry("groups", 0, "scale", value=float("inf")),
    "a_scale_below_zero": with_entry("groups", 0, "scale", value=-1.0),
    "a_path_for_a_revision": with_entry("facts", "revision", value="../../etc"),
    "settings_that_are_lists": with_entry("facts", "settings", "temperature", value=[1]),
    "no_tensors": tensors_changed(
        **{name: None for name in ("0__readout", "1__readout", "1__bias", "0__members__4__labels")}
    ),
    "a_tensor_too_many": tensors_changed(**{"2__readout": torch.ones(3, 32)}),
    "a_nan": tensors_changed(**{"0__readout": NAN}),
    "an_infinite_text_prompt": tensors_changed(
        **{"1__text_prompt__texts": torch.full((1, 2, 32), torch.inf)}
    ),
    "a_text_prompt_before_labels": tensors_changed(
        **{"1__text_prompt__texts": None, "1__text_prompt__labels": torch.ones(1, 2, 32)}
    ),
    "whole_numbers": tensors_changed(**{"0__readout": torch.ones(3, 32, dtype=torch.int64)}),
    "half_precision": tensors_changed(**{"0__readout": torch.ones(3, 32).half()}),
    "a_readout_of_two_labels": tensors_changed(**{"0__readout": torch.ones(2, 32)}),
    "a_readout_of_no_shape": tensors_changed(**{"0__readout": torch.tensor(1.0)}),
    "a_vector_for_a_readout": tensors_changed(**{"0__readout": torch.ones(3)}),
    "two_prompts": tensors_changed(**{"0__members__4__labels": torch.ones(2, 2, 32)}),
    "a_flat_prompt": tensors_changed(**{"0__members__4__labels": torch.ones(1, 32)}),
    "a_prompt_of_no_tokens": tensors_changed(**{"0__members__4__labels": torch.ones(1, 0, 32)}),
    "a_number_for_a_prompt": tensors_changed(**{"0__members__4__labels": torch.tensor(1.0)}),
    "a_prompt_of_another_name": tensors_changed(
        **{"0__members__4__labels": None, "0__members__4__images": torch.ones(1, 2, 32)}
    ),
}
#: What only the model tells.
MISFITS: dict[str, Callable[[Path], object]] = {
    "a_narrow_readout": tensors_changed(**{"0__readout": torch.ones(3, 31)}),
    "a_narrow_text_prompt": tensors_changed(**{"1__text_prompt__texts": torch.ones(1, 2, 31)}),
    "a_long_text_prompt": tensors_changed(**{"1__text_prompt__texts": torch.ones(1, 3000, 32)}),
    "an_unknown_task_model": with_entry("facts", "task_model", value="os.system"),
    "an_unknown_setting": with_entry("facts", "settings", "max_words", value=3),
    "a_setting_that_is_a_text": with_entry("facts", "settings", "temperature", value="hot"),
    "a_setting_out_of_range": with_entry("facts", "settings", "temperature", value=-1.0),
}
HEADS: dict[str, Callable[[Path], object]] = {
    "a_head_of_two_labels": tensors_changed(**{"0__members__1__head__bias": torch.ones(1, 2)}),
    "a_head_of_one_row": tensors_changed(**{"0__members__1__head__weight": torch.ones(1, 1, 32)}),
    "a_head_of_no_rows": tensors_changed(**{"0__members__1__head__bias": torch.ones(1)}),
}


def test_the_file_that_is_spoilt_below_is_good(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    for state, model in ((made_up(), make_dual()), (with_heads(), make_sequence())):
        write(state, path)
        for spoil in (tensors_changed(), metadata_changed(lambda _: None)):
            spoil(path)
        found = load_classifier(tmp_path, model=model)
        assert isinstance(found, PromptClassifier)


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_spoilt_file_is_refused_by_its_path(spoiler: str, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    write(made_up(), path)
    SPOILERS[spoiler](path)
    for load in (read, load_classifier):
        with pytest.raises(CheckpointError, match=r"classifier\.safetensors: no ") as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("spoiler", HEADS)
def test_a_spoilt_head_is_refused(spoiler: str, tmp_path: Path) -> None:
    write(with_heads(), tmp_path / "file")
    HEADS[spoiler](tmp_path / "file")
    with pytest.raises(CheckpointError, match="file: no classifier of this package"):
        read(tmp_path / "file")


@pytest.mark.parametrize("spoiler", MISFITS)
def test_a_file_that_does_not_fit_its_model_is_refused(
    spoiler: str, tmp_path: Path, model_folder: Path
) -> None:
    path = tmp_path / "classifier.safetensors"
    state = made_up()
    write(replace(state, ensemble=replace(state.ensemble, model_name=str(model_folder))), path)
    assert load_classifier(tmp_path).predict(["a"])
    MISFITS[spoiler](path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: it ") as raised:
        load_classifier(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["nowhere", ""])
def test_a_folder_without_a_classifier_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file: .*[Nn]o such file"):
        load_classifier(tmp_path / source)


# The model card.


def test_a_card_tells_what_the_classifier_is() -> None:
    state = made_up(revision="c" * 40, is_fitted=True, table="| way | accuracy |\n|---|---|")
    card = model_card(state)
    for expected in (
        *(f"`{label}`" for label in LABELS),
        'base_model: "bert"',
        f"`bert` at the revision `{'c' * 40}`",
        "3 stages of prompt tuning with `DualEncoderClassifier` (`temperature` `0.05`",
        "uniform ensemble and a linear fit",
        "plain texts: weight 0.667, stages 4, 1",
        "texts behind a tuned prompt: weight 0.333, stages 7",
        "## Measured\n\n| way | accuracy |",
        "load_classifier(",
        "optuna-llm-catalyst predict",
    ):
        assert expected in card
    assert "sentence_transformers" not in card
    bare = model_card(made_up(table=""), max_tokens=9)
    assert "Measured" not in bare and "encoder.max_seq_length = 9" in bare
    assert '("a text", "its pair")' in model_card(made_up(reads_pairs=True))


def test_a_card_renders_nothing_that_somebody_wrote() -> None:
    state = made_up(table="<script>alert(1)</script>")
    labels = ("<b>bold</b>", "a`b\n# head", 'c"d\u202e')
    state = replace(state, ensemble=replace(state.ensemble, labels=labels, model_name='x": y'))
    card = model_card(state, max_tokens=5)
    text = card.split("```")[0]
    assert "<script" not in card
    assert "`<b>bold</b>`" in text and "`a'b # head`" in text and "\u202e" not in card
    assert 'base_model: "x\\": y"' in card
    assert "\n# head" not in card
    compile(card.split("```python\n")[-1].split("```")[0], "README.md", "exec")
