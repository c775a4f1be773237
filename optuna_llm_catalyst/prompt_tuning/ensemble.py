"""The ensemble of a study's stages: uniform, and never an average of soft prompts.

Members whose texts are read in the same way form a group. Where a model compares texts with class
features, the features of a group's members are averaged, which costs nothing at inference; for
other models the log-probabilities are. The probabilities of the groups are averaged, however many
members each has: a group is another view of the text, and one stage with a prompt before the texts
was worth as much as the plain ones together (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from itertools import groupby
import math
from typing import Protocol
from typing import runtime_checkable
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.encoded_task import digest
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import stacked
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stage_records import StageRecord


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

#: Encoded texts, under a prompt that stands before them or as they are.
SplitOf = Callable[[Prompt | None], Split]


@runtime_checkable
class ComparesFeatures(Protocol):
    """A model whose logits are cosines of text features and class features, times a scale."""

    @property
    def scale(self) -> float: ...

    def class_features(self, prompt: Prompt | None) -> Tensor:
        """Unit features of the labels under prompts, of shape ``(P, C, d)``."""


@dataclass(frozen=True, eq=False)
class Member:
    """A stage in an ensemble.

    Attributes:
        number: The number of its trial.
        prompt: What it trained (``P = 1``): before the labels' names, or all that it has.
        text_prompt: What stands before the texts (``P = 1``), where that is another.
        classes: Unit class features, ``(C, d)``, where the model compares features.
        validation: Log-probabilities on the validation split, ``(n, C)``, for other models.
    """

    number: int
    prompt: Prompt
    text_prompt: Prompt | None = None
    classes: Tensor | None = None
    validation: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Members that read texts in the same way.

    Attributes:
        text_prompt: What stands before the texts (``P = 1``); None for nothing.
        members: The members, in the order of their numbers.
        weight: The group's part of the average.
        readout: What classifies, where the model compares features: the average of the members'
            class features, or a fit that was pulled towards it.
    """

    text_prompt: Prompt | None
    members: tuple[Member, ...]
    weight: float
    readout: Readout | None = None


@dataclass(frozen=True, eq=False)
class PromptEnsemble:
    """An ensemble of stages.

    Attributes:
        groups: Its members by how they read texts.
        labels: The label names in order.
        model_name: The frozen model.
        fingerprint: Tells models of one name apart.
    """

    groups: tuple[Group, ...]
    labels: tuple[str, ...]
    model_name: str
    fingerprint: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the members' trials."""
        return tuple(sorted(member.number for g in self.groups for member in g.members))


def load_prompt_ensemble(
    study: optuna.Study, k: int | None = None, *, artifact_store: ArtifactStore | None = None
) -> PromptEnsemble:
    """Loads the ensemble of a study's complete stages.

    Args:
        study: The study.
        k: So many of the best by the study's value; by default all. The best few were no better
            where it was measured.
        artifact_store: Where the study's artifacts are; by default ``llm_catalyst_artifacts``.

    Raises:
        ValueError: If ``k`` is below one.
        CheckpointError: If no stage is complete, a prompt cannot be loaded, or the stages are of
            different models or labels.
    """
    store = artifact_store or checkpoints.default_store()
    loaded = {trial.number: checkpoints.load_of(trial, store) for trial in member_trials(study, k)}
    return ensemble_of(loaded)


def member_trials(study: optuna.Study, k: int | None = None) -> list[FrozenTrial]:
    """The trials whose stages are members; a refined stage takes the place of what it continues.

    Raises:
        ValueError: If ``k`` is below one.
        CheckpointError: If no stage is complete.
    """
    check_at_least(1, k=k)
    trials = records.all_trials(study)
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    if not complete:
        raise CheckpointError(f"study {study.study_name!r} has no complete stage yet.")
    found = {trial.number: records.load(trial, "stage", StageRecord) for trial in complete}
    replaced = {record.refined_from for record in found.values() if record}
    members = [trial for trial in complete if trial.number not in replaced]
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    best = sorted(members, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[:k]
    return sorted(best, key=lambda trial: trial.number)


def ensemble_of(loaded: dict[int, TrainedPrompt]) -> PromptEnsemble:
    """The ensemble of trained prompts, by the numbers of their trials.

    Raises:
        CheckpointError: If they are of different models or labels.
    """
    facts = {number: _known(trained) for number, trained in loaded.items()}
    (first, known), *others = facts.items()
    for number, other in others:
        if other != known:
            raise CheckpointError(
                f"stage {number} was trained on {other[1]!r} for the labels "
                f"{', '.join(other[0])}; stage {first} on {known[1]!r} for "
                f"{', '.join(known[0])}: an ensemble is of one model and one task."
            )
    members = [Member(number, *sides(trained.prompt)) for number, trained in loaded.items()]
    return PromptEnsemble(grouped(members), *known)


def _known(trained: TrainedPrompt) -> tuple[tuple[str, ...], str, str]:
    facts = trained.facts
    return facts.labels, facts.model_name, facts.fingerprint


def grouped(members: Sequence[Member]) -> tuple[Group, ...]:
    """Members in groups by the prompt before their texts; plain texts first."""
    found: dict[str, list[Member]] = {"": []}
    for member in members:
        key = "" if member.text_prompt is None else digest(member.text_prompt)
        found.setdefault(key, []).append(member)
    groups = [tuple(group) for group in found.values() if group]
    return tuple(Group(group[0].text_prompt, group, 1 / len(groups)) for group in groups)


def averaged(groups: Sequence[Group], model: TaskModel) -> tuple[Group, ...]:
    """The groups with the average of their class features, where the model compares features."""
    if not isinstance(model, ComparesFeatures):
        return tuple(groups)
    return tuple(replace(group, readout=_average(group.members, model)) for group in groups)


def log_probs(model: TaskModel, groups: Sequence[Group], split_of: SplitOf) -> Tensor:
    """Log-probabilities of the labels for each text, of shape ``(n, C)``."""
    parts = [
        _group_log_probs(model, group, split_of(group.text_prompt)) + math.log(group.weight)
        for group in groups
    ]
    return torch.logsumexp(torch.stack(parts), dim=0)


@torch.inference_mode()
def _group_log_probs(model: TaskModel, group: Group, split: Split) -> Tensor:
    if group.readout is not None:
        return group.readout.log_probs(split.rows("features"))
    together = [model.log_probs(p, split) for p in _stacked([m.prompt for m in group.members])]
    return F.log_softmax(torch.cat(together).mean(0), dim=-1)  # (P, n, C) to (n, C)


@torch.inference_mode()
def _average(members: Sequence[Member], model: ComparesFeatures) -> Readout:
    unknown = [member.prompt for member in members if member.classes is None]
    known = [member.classes for member in members if member.classes is not None]
    features = [*known, *(row for p in _stacked(unknown) for row in model.class_features(p))]
    mean = torch.stack(features).mean(0)  # (P, C, d) to (C, d)
    return Readout(F.normalize(mean, dim=-1), model.scale)


def _stacked(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of one kind as few of many ``P``: those of equal shapes, such as a rank, as one."""
    alike = groupby(sorted(prompts, key=_shapes), key=_shapes)
    return [stacked(list(group)) for _, group in alike]


def _shapes(prompt: Prompt) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((name, tuple(tensor.shape)) for name, tensor in prompt.tensors.items())
