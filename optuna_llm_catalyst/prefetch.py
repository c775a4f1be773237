"""Proposals that are made while a stage trains: the one transient thing that a sampler holds."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import optuna

from optuna_llm_catalyst import background
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import Proposal


class Prefetch:
    """The proposals under way, at most one for each study and each set of fixed tokens.

    A copy, a pickle and a fork have none: the thread that makes a proposal is in one process.
    """

    def __init__(self) -> None:
        self._under_way: dict[Any, Future[Proposal]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_under_way": {}}

    def start(
        self, study: optuna.Study, fixed: Mapping[int, int], propose: Callable[[], Proposal]
    ) -> None:
        """Starts to make a proposal for a later trial of a study."""
        self._under_way[_key(study, fixed)] = background.start(propose)

    def is_under_way(self, study: optuna.Study, fixed: Mapping[int, int]) -> bool:
        """Whether a proposal for the study is being made or waits to be taken."""
        return _key(study, fixed) in self._under_way

    def take(self, study: optuna.Study, fixed: Mapping[int, int]) -> Future[Proposal] | None:
        """The proposal for the study, which nobody else gets then; None if there is none."""
        return self._under_way.pop(_key(study, fixed), None)


def _key(study: optuna.Study, fixed: Mapping[int, int]) -> Any:
    return records.identity(study), frozenset(fixed.items())
