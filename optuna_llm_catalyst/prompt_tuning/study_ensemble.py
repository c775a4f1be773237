"""The ensemble of a study while it grows: its members are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import optuna
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import ensemble
from optuna_llm_catalyst.prompt_tuning.encoded_task import EncodedTask
from optuna_llm_catalyst.prompt_tuning.encoded_task import sides
from optuna_llm_catalyst.prompt_tuning.ensemble import ComparesFeatures
from optuna_llm_catalyst.prompt_tuning.ensemble import Member
from optuna_llm_catalyst.prompt_tuning.fitted import fit_groups
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompt_store import PromptStore
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt


_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class StudyEnsemble:
    """Members by the study and the number of their trial.

    Args:
        model: The frozen model.
        data: The task, encoded.
        prompts: Where the members' prompts are.
    """

    def __init__(self, model: TaskModel, data: EncodedTask, prompts: PromptStore) -> None:
        self._model = model
        self._data = data
        self._prompts = prompts
        self._members: dict[tuple[str, int], Member] = {}
        self._named: set[tuple[str, int]] = set()

    def members(self, study: optuna.Study) -> list[Member]:
        """The members so far. One whose prompt cannot be loaded is left out and named once."""
        try:
            trials = ensemble.member_trials(study)
        except CheckpointError:  # No stage is complete yet.
            return []
        found = []
        for trial in trials:
            key = study.study_name, trial.number
            if key not in self._members:
                try:
                    self.keep(study, trial.number, self._prompts.load_of(study, trial).prompt)
                except CheckpointError as error:
                    self._warn(key, error)
                    continue
            found.append(self._members[key])
        return found

    def together(
        self, study: optuna.Study, k: int | None, *, fit: bool
    ) -> tuple[ensemble.PromptEnsemble, bool]:
        """The ensemble of the ``k`` best stages, or all, and whether it is fitted to the task.

        Raises:
            ValueError: If ``k`` is below one.
            CheckpointError: If no stage is complete, or none has a prompt that can be loaded.
        """
        numbers = {trial.number for trial in ensemble.member_trials(study, k)}
        members = [member for member in self.members(study) if member.number in numbers]
        if not members:
            raise CheckpointError(f"study {study.study_name!r} has no stage that can be loaded.")
        groups = ensemble.averaged(ensemble.grouped(members), self._model)
        is_fitted = fit and any(group.readout is not None for group in groups)
        found = ensemble.PromptEnsemble(
            fit_groups(groups, self._data) if is_fitted else groups,
            tuple(self._model.labels),
            self._model.name,
            self._model.fingerprint,
        )
        return found, is_fitted

    def _warn(self, key: tuple[str, int], error: CheckpointError) -> None:
        # It is tried again each time: a store may have had a bad moment.
        if key not in self._named:
            self._named.add(key)
            _logger.warning(f"Stage {key[1]} is left out of the ensemble: {error}")

    def keep(self, study: optuna.Study, number: int, trained: Prompt) -> Member:
        """Keeps the prompt of a stage as a member."""
        prompt = trained.map(lambda tensor: tensor.to(self._model.device))
        [member] = self.candidates(*sides(prompt))
        member = self._members[study.study_name, number] = replace(member, number=number)
        return member

    @torch.inference_mode()
    def candidates(self, prompts: Prompt, text_prompt: Prompt | None) -> list[Member]:
        """Prompts (``P``) under one text prompt as members without a trial."""
        members = [Member(-1, prompts[[i]], text_prompt) for i in range(len(prompts))]
        if isinstance(self._model, ComparesFeatures):
            rows = self._model.class_features(prompts)  # (P, C, d)
            return [replace(m, classes=row) for m, row in zip(members, rows, strict=True)]
        split = self._data.split("validation", text_prompt)
        rows = self._model.log_probs(prompts, split)  # (P, n, C)
        return [replace(m, validation=row) for m, row in zip(members, rows, strict=True)]

    def validation_log_probs(self, members: Sequence[Member]) -> Tensor:
        """Log-probabilities of the members' ensemble on the validation split: (n, C)."""
        rows = [member.validation for member in members if member.validation is not None]
        if rows:  # What the members say is known.
            return F.log_softmax(torch.stack(rows).mean(0), dim=-1)
        groups = ensemble.averaged(ensemble.grouped(members), self._model)
        split_of = partial(self._data.split, "validation")
        return ensemble.log_probs(self._model, groups, split_of)
