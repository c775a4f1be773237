"""The ensemble, fitted: a readout of each group's features, pulled towards the group's mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.ensemble import Group
from optuna_llm_catalyst.prompt_tuning.linear_fit import Data
from optuna_llm_catalyst.prompt_tuning.linear_fit import fit_readout
from optuna_llm_catalyst.prompt_tuning.split import Split


def fit_groups(
    groups: Sequence[Group], data: EncodedTask, *, refit: bool = True
) -> tuple[Group, ...]:
    """The groups with fitted readouts, where they have readouts; see ``fit_readout``.

    Args:
        groups: Groups with the average of their members' class features.
        data: The task: the fit is made on train, chosen on validation.
        refit: Whether to fit on both splits at the end.
    """
    return tuple(_fitted(group, data, refit=refit) for group in groups)


def _fitted(group: Group, data: EncodedTask, *, refit: bool) -> Group:
    if group.readout is None:
        return group
    train = examples(data.split("train", group.text_prompt))
    validation = examples(data.split("validation", group.text_prompt))
    fitted = fit_readout(train, validation, group.readout, refit=refit)
    return replace(group, readout=fitted.readout)


def examples(split: Split) -> Data:
    """Features ``(n, d)`` and labels ``(n,)`` of a split."""
    return split.rows("features"), split.labels
