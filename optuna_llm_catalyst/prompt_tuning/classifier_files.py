"""A classifier without its frozen model, and the safetensors file that holds it.

============================  ===========  ====================================================
tensor                        shape        meaning
============================  ===========  ====================================================
``i.text_prompt.NAME``        (1, …)       what stands before the texts of group ``i``
``i.readout``                 (C, d)       its class matrix
``i.bias``                    (C,)         what its readout adds, where it is fitted
``i.members.NUMBER.NAME``     (1, …)       what a stage trained, its head included
============================  ===========  ====================================================

The metadata, JSON, says which of them there are, and what the classifier is. All are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from importlib.metadata import version
import json
import math
from pathlib import Path
import re

from safetensors.torch import save_file
import torch
from torch import Tensor

from optuna_llm_catalyst.file_writing import write_whole
from optuna_llm_catalyst.prompt_tuning.checkpoints import explained
from optuna_llm_catalyst.prompt_tuning.checkpoints import read_tensors
from optuna_llm_catalyst.prompt_tuning.ensemble import Group
from optuna_llm_catalyst.prompt_tuning.ensemble import Member
from optuna_llm_catalyst.prompt_tuning.ensemble import PromptEnsemble
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.prompts import kind_of
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import Tensors
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import encode


FILE_NAME = "classifier.safetensors"
_FORMAT = "1"
_METADATA = "llm_catalyst_classifier"
_COMMIT = re.compile("[0-9a-f]{40}")


def installed() -> dict[str, str]:
    """The versions that a classifier is made with."""
    return {name: version(name) for name in ("optuna-llm-catalyst", "torch", "transformers")}


@dataclass(frozen=True)
class ClassifierFacts:
    """What is known of a classifier beside its tensors.

    Attributes:
        task_model: The class of its task model.
        settings: Its settings.
        revision: The hub's commit of the frozen model, if it came from there.
        is_fitted: Whether its readouts are fitted; else they are the average of the stages'.
        reads_pairs: Whether it reads pairs of texts; None if that is not known.
        table: What was measured, as a Markdown table; may be empty.
        versions: The versions that it was made with, by package.
    """

    task_model: str
    settings: dict[str, int | float | str | bool | None]
    revision: str | None = None
    is_fitted: bool = False
    reads_pairs: bool | None = None
    table: str = ""
    versions: dict[str, str] = field(default_factory=installed)

    def __post_init__(self) -> None:
        # It becomes a part of a path in the hub's cache.
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ValueError(f"its revision {self.revision!r} is no commit")


@dataclass(frozen=True, eq=False)
class ClassifierState:
    """A classifier without its frozen model."""

    ensemble: PromptEnsemble
    facts: ClassifierFacts


@dataclass(frozen=True)
class _Member:
    number: int
    kind: str


@dataclass(frozen=True)
class _Group:
    members: tuple[_Member, ...]
    weight: float
    text_prompt: str | None = None
    scale: float | None = None
    has_bias: bool = False

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a group has no member")
        if not all(0 < x < math.inf for x in (self.weight, self.scale) if x is not None):
            raise ValueError(f"weight {self.weight} and scale {self.scale} must be positive")


@dataclass(frozen=True)
class _Metadata:
    format: str
    labels: tuple[str, ...]
    model_name: str
    fingerprint: str
    facts: ClassifierFacts
    groups: tuple[_Group, ...]

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise ValueError(f"it has format {self.format!r}")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError("its labels must be two or more distinct names")
        numbers = [member.number for group in self.groups for member in group.members]
        if len(set(numbers)) < len(numbers) or min(numbers, default=-1) < 0:
            raise ValueError("its members must be stages, each once")
        if not math.isclose(sum(group.weight for group in self.groups), 1):
            raise ValueError("the weights of its groups must sum to one")


def write(state: ClassifierState, path: str | Path) -> None:
    """Writes a classifier to a safetensors file; an old one is replaced once it is whole.

    Raises:
        CheckpointError: If it cannot be written.
    """
    found = state.ensemble
    groups = tuple(map(_described, found.groups))
    metadata = _Metadata(
        _FORMAT, found.labels, found.model_name, found.fingerprint, state.facts, groups
    )
    named = {
        name: tensor.detach().cpu().contiguous().clone()
        for i, group in enumerate(found.groups)
        for name, tensor in _named(str(i), group).items()
    }
    text = json.dumps(encode(metadata), sort_keys=True, allow_nan=False)
    with explained(f"{path}: cannot be written"):
        write_whole(Path(path), lambda new: save_file(named, str(new), metadata={_METADATA: text}))


def read(path: str | Path, *, name: str = "") -> ClassifierState:
    """Reads a classifier from a file, or from a folder that holds one.

    Args:
        path: The file or the folder.
        name: What errors call it; by default its path.

    Raises:
        CheckpointError: If it is not there, was not written by this package, or is incomplete.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    name = name or str(path)
    texts, tensors = read_tensors(path, f"{name}: no safetensors file")
    with explained(f"{name}: no classifier of this package (format {_FORMAT})"):
        metadata = decode(_Metadata, json.loads(texts[_METADATA]))
        _check_tensors(tensors)
        groups = tuple(_group(str(i), g, tensors) for i, g in enumerate(metadata.groups))
        known = {name for i, group in enumerate(groups) for name in _named(str(i), group)}
        if unknown := tensors.keys() - known:
            raise ValueError(f"its tensor {min(unknown)!r} belongs to nothing")
        _check_labels(groups, len(metadata.labels))
    found = PromptEnsemble(groups, metadata.labels, metadata.model_name, metadata.fingerprint)
    return ClassifierState(found, metadata.facts)


def _described(group: Group) -> _Group:
    return _Group(
        tuple(_Member(member.number, member.prompt.kind.name) for member in group.members),
        group.weight,
        None if group.text_prompt is None else group.text_prompt.kind.name,
        None if group.readout is None else group.readout.scale,
        group.readout is not None and group.readout.bias is not None,
    )


def _named(place: str, group: Group) -> Tensors:
    """The tensors of a group by their names in the file."""
    named = _prefixed(f"{place}.text_prompt.", group.text_prompt)
    for member in group.members:
        named |= _prefixed(f"{place}.members.{member.number}.", member.prompt)
    if group.readout is not None:
        named[f"{place}.readout"] = group.readout.weights
        if group.readout.bias is not None:
            named[f"{place}.bias"] = group.readout.bias
    return named


def _prefixed(prefix: str, prompt: Prompt | None) -> dict[str, Tensor]:
    return {} if prompt is None else {prefix + name: t for name, t in prompt.tensors.items()}


def _group(place: str, described: _Group, tensors: Mapping[str, Tensor]) -> Group:
    text_prompt, readout = None, None
    if described.text_prompt is not None:
        text_prompt = _prompt(described.text_prompt, f"{place}.text_prompt.", tensors)
        if "texts" not in text_prompt.tensors:
            raise ValueError(f"the prompt of group {place} stands before no text")
    if described.scale is not None:
        bias = tensors[f"{place}.bias"] if described.has_bias else None
        readout = Readout(tensors[f"{place}.readout"], described.scale, bias)
    members = tuple(
        Member(m.number, _prompt(m.kind, f"{place}.members.{m.number}.", tensors), text_prompt)
        for m in described.members
    )
    return Group(text_prompt, members, described.weight, readout)


def _prompt(kind: str, prefix: str, tensors: Mapping[str, Tensor]) -> Prompt:
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    prompt = Prompt(kind_of(kind, own), own)
    shape = tuple(prompt.words().shape)
    if len(shape) != 3 or shape[0] != 1 or not all(shape):
        raise ValueError(f"the prompt {prefix!r} has the shape {shape}, expected (1, L, d)")
    return prompt


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(f"its tensor {name!r} must hold finite numbers in float32")


def _check_labels(groups: Sequence[Group], n_labels: int) -> None:
    """Raises unless each readout and each head has one row a label."""
    for group in groups:
        readout = group.readout
        if readout is not None and readout.weights.ndim != 2:
            raise ValueError("a readout is no matrix")
        if readout is not None and readout.bias is not None and readout.bias.ndim != 1:
            raise ValueError("a bias is no vector")
        of_group = [] if readout is None else [readout.weights, readout.bias]
        heads = [tensor[0] for m in group.members for tensor in m.prompt.head.values()]
        for rows in (*of_group, *heads):
            if rows is not None and (not rows.ndim or len(rows) != n_labels):
                raise ValueError(f"a readout has the shape {tuple(rows.shape)}, not {n_labels}")
