"""Where an objective's trained prompts go: an artifact store, or memory where that is full."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import Trial

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import checkpoints
from optuna_llm_catalyst.prompt_tuning.checkpoints import TrainedPrompt


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class PromptStore:
    """Keeps trained prompts.

    Args:
        artifact_store: Where they go; by default a folder ``llm_catalyst_artifacts``, made when
            it is first needed.

    Attributes:
        unsaved: Those that could not be stored, by the name of their study and the number of
            their trial.
    """

    def __init__(self, artifact_store: ArtifactStore | None = None) -> None:
        self.unsaved: dict[tuple[str, int], TrainedPrompt] = {}
        self._given = artifact_store

    @property
    def artifact_store(self) -> ArtifactStore:
        """Where the prompts go."""
        if self._given is None:
            self._given = checkpoints.folder_store(checkpoints.DEFAULT_FOLDER)
        return self._given

    def check(self) -> None:
        """Checks that prompts can be stored, before a stage is spent on one.

        Raises:
            CheckpointError: If the artifact store or the temporary folder cannot be written.
        """
        checkpoints.check_writable(self.artifact_store)

    def save(self, trial: BaseTrial, trained: TrainedPrompt) -> None:
        """Stores a trained prompt, or keeps it in memory: a full disk costs no stage."""
        try:
            checkpoints.save(trial, trained, self.artifact_store)
        except CheckpointError as error:
            assert isinstance(trial, Trial)
            self.unsaved[trial.study.study_name, trial.number] = trained
            _logger.error(f"{error}. It is kept in memory only, until this process ends.")

    def load(self, study: optuna.Study, number: int) -> TrainedPrompt:
        """The trained prompt of a stage, from memory if it could not be stored.

        Raises:
            CheckpointError: If neither memory nor the artifact store has it.
        """
        kept = self.unsaved.get((study.study_name, number))
        return kept or checkpoints.load_soft_prompt(
            study, trial_number=number, artifact_store=self.artifact_store
        )

    def load_of(self, study: optuna.Study, trial: FrozenTrial) -> TrainedPrompt:
        """The same for a trial at hand, without a look at the study's others."""
        kept = self.unsaved.get((study.study_name, trial.number))
        return kept or checkpoints.load_of(trial, self.artifact_store)

    def save_unsaved(self, folder: str | Path) -> list[Path]:
        """Writes the prompts that could not be stored to files of a folder, and returns these.

        Raises:
            CheckpointError: If they cannot be written there, either.
        """
        paths = []
        for (_, number), trained in self.unsaved.items():
            paths.append(Path(folder) / f"soft_prompt_of_stage_{number}.safetensors")
            checkpoints.write(trained, paths[-1])
        return paths
