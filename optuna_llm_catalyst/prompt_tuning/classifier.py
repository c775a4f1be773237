"""What a study is for: a classifier with scikit-learn's conventions, which does not need it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol
from typing import runtime_checkable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.file_writing import write_whole
from optuna_llm_catalyst.prompt_tuning import classifier_files
from optuna_llm_catalyst.prompt_tuning.checkpoints import explained
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierFacts
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.classifier_files import FILE_NAME
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.encoded_task import encode
from optuna_llm_catalyst.prompt_tuning.ensemble import averaged
from optuna_llm_catalyst.prompt_tuning.ensemble import Group
from optuna_llm_catalyst.prompt_tuning.ensemble import log_probs
from optuna_llm_catalyst.prompt_tuning.ensemble import PromptEnsemble
from optuna_llm_catalyst.prompt_tuning.model_card import CARD_NAME
from optuna_llm_catalyst.prompt_tuning.model_card import MATRIX_NAME
from optuna_llm_catalyst.prompt_tuning.model_card import model_card
from optuna_llm_catalyst.prompt_tuning.models import reads_images
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.text_inputs import read_paths
from optuna_llm_catalyst.prompt_tuning.text_inputs import read_texts


if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class _CutsTexts(Protocol):
    """A model that says at how many tokens it cuts texts."""

    @property
    def max_text_tokens(self) -> int: ...


class PromptClassifier:
    """An ensemble of tuned prompts on a frozen model, as a classifier.

    It has the methods that scikit-learn asks of a fitted classifier, and can be the last step of
    a pipeline. Like ``sklearn.frozen.FrozenEstimator`` it stays as it is: ``fit`` does nothing,
    and a clone is the classifier itself.

    Args:
        model: The frozen model with the task on top.
        ensemble: The ensemble. Where the model compares features, groups without a readout get
            the average of their members' class features.
        is_fitted: Whether the readouts are fitted.
        reads_pairs: Whether it reads pairs of texts; None takes either.
        table: What was measured, as a Markdown table for the model card.
        batch_size: Texts that are encoded at once; memory is bounded by it.

    Attributes:
        classes_: The label names, in the task's order, which is that of the columns of
            ``predict_proba``. Where scikit-learn expects them sorted (``log_loss``), sort the
            columns by them.

    Raises:
        CheckpointError: If the ensemble was made with another model or for other labels.
    """

    def __init__(
        self,
        model: TaskModel,
        ensemble: PromptEnsemble,
        *,
        is_fitted: bool = False,
        reads_pairs: bool | None = None,
        table: str = "",
        batch_size: int = 1024,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        _check_model(model, ensemble)
        placed = [_on_device(group, model.device) for group in ensemble.groups]
        groups = [g if g.readout is not None else averaged([g], model)[0] for g in placed]
        self.model = model
        self.ensemble = replace(ensemble, groups=tuple(groups))
        self.is_fitted = is_fitted
        self.reads_pairs = reads_pairs
        self.table = table
        self.batch_size = batch_size
        self.classes_ = np.array(ensemble.labels)

    def __repr__(self) -> str:
        return (
            f"PromptClassifier(model={self.ensemble.model_name!r}, "
            f"labels={len(self.classes_)}, stages={len(self.ensemble.numbers)})"
        )

    def predict(self, texts: Iterable[object]) -> NDArray[np.str_]:
        """The label names of texts, of shape ``(n,)``; see :meth:`predict_proba`."""
        labels: NDArray[np.str_] = self.classes_[self.predict_proba(texts).argmax(1)]
        return labels

    def predict_proba(self, texts: Iterable[object]) -> NDArray[np.float64]:
        """The probabilities of the labels for each text.

        Args:
            texts: A list, a tuple, an array or a series of texts, or of pairs of texts; of paths,
                where the model reads images.

        Returns:
            An array of shape ``(n, C)``, whose rows sum to one.

        Raises:
            ValueError: If one of them is no text, is empty, or is a pair where others are none.
            DataError: If a path leads to no image.
        """
        if reads_images(self.model):
            examples = read_paths(texts)
        else:
            examples = read_texts(texts, pairs=self.reads_pairs)
        parts = [
            self._probabilities(examples[start : start + self.batch_size])
            for start in range(0, len(examples), self.batch_size)
        ]
        return np.concatenate([np.empty((0, len(self.classes_))), *parts])

    def score(self, texts: Iterable[object], labels: Iterable[object]) -> float:
        """The accuracy on texts whose label names are known.

        Raises:
            ValueError: If there are not as many labels as texts, or one of them is not known.
        """
        known, expected = set(self.classes_.tolist()), np.array(list(labels))
        predicted = self.predict(texts)
        if expected.shape != predicted.shape or not len(expected):
            raise ValueError(f"There are {len(predicted)} texts and {len(expected)} labels.")
        if unknown := [label for label in expected.tolist() if label not in known]:
            raise ValueError(f"The label {unknown[0]!r} is none of {', '.join(self.classes_)}.")
        return float((predicted == expected).mean())

    def save(self, path: str | Path) -> None:
        """Writes the classifier, without its frozen model, to a safetensors file.

        A file that is there is replaced once the new one is whole.

        Raises:
            CheckpointError: If it cannot be written.
        """
        classifier_files.write(self.state, path)

    def export(self, folder: str | Path) -> list[Path]:
        """Writes all that is needed to load it elsewhere, where the frozen model can be had.

        ``classifier.safetensors`` and a model card, ``README.md``; if texts are read without a
        prompt and compared with class features, ``class_matrix.npy``, which serves without this
        package.

        Args:
            folder: The folder; made if need be.

        Returns:
            The files.

        Raises:
            CheckpointError: If they cannot be written.
        """
        folder = Path(folder)
        path, card, matrix = (folder / n for n in (FILE_NAME, CARD_NAME, MATRIX_NAME))
        self.save(path)
        rows = self._class_matrix()
        max_tokens = None
        if rows is not None and isinstance(self.model, _CutsTexts):
            max_tokens = self.model.max_text_tokens
        text = model_card(self.state, max_tokens=max_tokens, of_images=reads_images(self.model))
        with explained(f"{folder}: cannot be written"):
            write_whole(card, lambda new: new.write_text(text, encoding="utf-8"))
            if rows is None:
                matrix.unlink(missing_ok=True)  # One of an earlier export would mislead.
                return [path, card]
            write_whole(matrix, partial(_write_array, rows))
        return [path, card, matrix]

    @property
    def state(self) -> ClassifierState:
        """The classifier without its frozen model."""
        facts = ClassifierFacts(
            type(self.model).__name__,
            dict(self.model.settings),
            getattr(self.model, "revision", None),
            self.is_fitted,
            self.reads_pairs,
            self.table,
        )
        return ClassifierState(self.ensemble, facts)

    def fit(self, texts: object = None, labels: object = None, **options: object) -> Self:
        """Does nothing, for pipelines: the prompts are trained by a study."""
        del texts, labels, options
        return self

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that it was made with, by name."""
        del deep
        names = ("model", "ensemble", "is_fitted", "reads_pairs", "table", "batch_size")
        return {name: getattr(self, name) for name in names}

    def set_params(self, *, batch_size: int | None = None) -> Self:
        """Sets the batch size; all else stays as it was tuned."""
        check_at_least(1, batch_size=batch_size)
        self.batch_size = batch_size or self.batch_size
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_clone__(self) -> Self:
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn import utils  # type: ignore[import-untyped]

        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=False, one_d_labels=True),
            classifier_tags=utils.ClassifierTags(),
            requires_fit=False,
            input_tags=utils.InputTags(one_d_array=True, two_d_array=False, string=True),
        )

    @torch.inference_mode()
    def _probabilities(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Probabilities (n, C) of the texts of one batch, encoded once a group."""
        found = log_probs(self.model, self.ensemble.groups, partial(encode, self.model, examples))
        rows: NDArray[np.float64] = found.cpu().double().softmax(-1).numpy()
        return rows

    def _class_matrix(self) -> NDArray[np.float32] | None:
        """The matrix (C, d + 1) of scaled weights and biases; None if more is needed."""
        first, *others = self.ensemble.groups
        is_plain = first.text_prompt is None and not others and not self.reads_pairs
        is_known = isinstance(self.model, _CutsTexts) or reads_images(self.model)
        if not (is_plain and first.readout and is_known):
            return None
        weights, bias = first.readout.scale * first.readout.weights, first.readout.bias
        bias = weights.new_zeros(len(weights)) if bias is None else bias
        rows = torch.cat([weights, bias.unsqueeze(1)], 1)  # (C, d + 1)
        return rows.cpu().numpy()


def _check_model(model: TaskModel, ensemble: PromptEnsemble) -> None:
    if ensemble.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"the classifier was made with {ensemble.model_name!r} (fingerprint "
            f"{ensemble.fingerprint}), this model is {model.name!r} (fingerprint "
            f"{model.fingerprint}): give the model that it was made with."
        )
    if ensemble.labels != tuple(model.labels):
        raise CheckpointError(
            f"the classifier was made for the labels {', '.join(ensemble.labels)}, this model "
            f"has {', '.join(model.labels)}."
        )


def _on_device(group: Group, device: torch.device) -> Group:
    def placed(prompt: Prompt) -> Prompt:
        return prompt.map(lambda tensor: tensor.to(device))

    text_prompt = None if group.text_prompt is None else placed(group.text_prompt)
    members = tuple(
        replace(member, prompt=placed(member.prompt), text_prompt=text_prompt)
        for member in group.members
    )
    readout = None if group.readout is None else group.readout.to(device)
    return replace(group, text_prompt=text_prompt, members=members, readout=readout)


def _write_array(rows: NDArray[np.float32], path: Path) -> None:
    with path.open("wb") as file:  # Given a path, NumPy would add a suffix of its own.
        np.save(file, rows)
