"""CLIP and SigLIP as classifiers of images, against what transformers says of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
import re
import sys
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import CLIPClassifier
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import DistilledStage
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import load_task
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import PromptClassifier
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import Task
from optuna_llm_catalyst.prompt_tuning import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.data.images import read_image
from optuna_llm_catalyst.prompt_tuning.models import clip
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .tiny import make_dual
from .tiny import make_task
from .tiny_clip import COLOUR_NAMES
from .tiny_clip import FAMILIES
from .tiny_clip import make_clip
from .tiny_clip import make_pretrained
from .tiny_clip import make_towers
from .tiny_clip import N_POSITIONS
from .tiny_clip import save_squares
from .tiny_clip import save_towers


PROMPTS = ("a photo of the", "what is it in")
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_squares(tmp_path_factory.mktemp("squares"), train=6, validation=4, test=3)


@pytest.fixture(scope="module")
def task(squares: Path) -> Task:
    return load_task(squares)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family, as `load_pretrained` takes it."""
    return {family: save_towers(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def hard(model: CLIPClassifier, tokenizer: Any, *texts: str, kind: PromptKind = SOFT) -> Prompt:
    """Prompts at the words of texts of one length."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Prompt(kind, kind.start(model.embed(ids), model.placement))


def tokens_of(family: str, tokenizer: Any, text: str) -> dict[str, Tensor]:
    """The tokens of one text, as the family's own processor makes them."""
    padding = {"clip": {}, "siglip": {"padding": "max_length", "max_length": N_POSITIONS}}[family]
    inputs: dict[str, Tensor] = tokenizer(text, return_tensors="pt", **padding)
    return inputs


@torch.no_grad()
def slowly(family: str, texts: Sequence[str]) -> Tensor:
    """What transformers says of whole texts, one by one: unit features (n, d)."""
    model, tokenizer, _ = make_towers(family)
    found = [model.get_text_features(**tokens_of(family, tokenizer, t)) for t in texts]
    return F.normalize(torch.cat([features.pooler_output for features in found]), dim=-1)


def named(prompt: str) -> list[str]:
    return [f"{prompt} {name.replace('_', ' ')}".strip() for name in COLOUR_NAMES]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Law: a hard prompt at `inputs_embeds` is the hard prompt at `input_ids`.


@each_family
def test_names_behind_hard_prompts_are_read_as_tokens(family: str) -> None:
    model, tokenizer = make_clip(family), make_towers(family)[1]
    found = model.class_features(hard(model, tokenizer, *PROMPTS))
    assert_same(found, torch.stack([slowly(family, named(prompt)) for prompt in PROMPTS]))
    assert_same(model.class_features(None)[0], slowly(family, named("")))


@each_family
def test_a_deep_prompt_that_is_not_trained_is_the_soft_one(family: str) -> None:
    model, tokenizer = make_clip(family), make_towers(family)[1]
    soft = hard(model, tokenizer, *PROMPTS)
    deep = hard(model, tokenizer, *PROMPTS, kind=DeepPrompt())
    assert len(deep.trained) == 2
    assert_same(model.class_features(deep), model.class_features(soft))
    # Layer norms take out what is the same for all dimensions.
    moved = deep.map(lambda tensor: tensor + torch.linspace(-1, 1, tensor.shape[-1]))
    assert (model.class_features(moved) - model.class_features(soft)).abs().max() > 1e-3


@each_family
def test_images_are_read_as_the_model_reads_them(
    family: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, processor = make_towers(family)
    monkeypatch.setattr(clip, "_MAX_IMAGES", 4)
    split = make_clip(family).encode(task.test)
    expected = []
    for example in task.test:
        inputs = processor(images=read_image(example.text), return_tensors="pt")
        with torch.no_grad():
            expected.append(plain.get_image_features(**inputs).pooler_output)
    assert_same(split.rows("features"), F.normalize(torch.cat(expected), dim=-1))


@each_family
@torch.no_grad()
def test_probabilities_are_those_of_the_whole_model(family: str, task: Task) -> None:
    """SigLIP's bias is in them: it cancels."""
    plain, tokenizer, processor = make_towers(family)
    model = make_clip(family)
    images = processor(images=[read_image(e.text) for e in task.test], return_tensors="pt")
    texts = [tokens_of(family, tokenizer, text) for text in named(PROMPTS[0])]
    logits = [plain(**images, **tokens).logits_per_image for tokens in texts]  # (n, 1) each
    found = model.log_probs(hard(model, tokenizer, PROMPTS[0]), model.encode(task.test))
    assert_same(found[0].exp(), torch.cat(logits, dim=1).softmax(-1))


# Training.


@each_family
def test_a_stage_lowers_the_loss_and_changes_the_prompt_alone(family: str, task: Task) -> None:
    pretrained = make_pretrained(family)
    assert pretrained.image_tower is not None
    model = CLIPClassifier(pretrained, task.labels)
    whole = pretrained.image_tower.model
    before = {name: weights.clone() for name, weights in whole.state_dict().items()}
    start = hard(model, pretrained.tokenizer, PROMPTS[0])
    seen: list[float] = []

    def observe(evaluation: Evaluation) -> bool:
        seen.append(evaluation.loss)
        return False

    train, validation = model.encode(task.train), model.encode(task.validation)
    with model.metered() as passes:
        stage = GradientStage(n_steps=20, lr=0.05, eval_every=10)
        stage.run(Run(model, start, train, validation, observe=observe))
    assert passes.sequences == passes.forward * len(task.labels) > 0
    assert seen[-1] < 0.9 * seen[0]
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, before[name]), name
    assert not any(weights.requires_grad for weights in whole.parameters())


STAGES: dict[str, Callable[[], Any]] = {
    "gradient": lambda: GradientStage(n_steps=4, lr=0.05, eval_every=2),
    "bbt": lambda: BlackBoxStage(n_queries=16, population_size=4, intrinsic_dim=4),
    "gdfo": lambda: DistilledStage(n_queries=16, population_size=4, intrinsic_dim=4),
    "zo": lambda: ZerothOrderStage(n_queries=16),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_method_runs_in_a_study(stage: str, task: Task, store: Any) -> None:
    model = make_clip()
    objective = make_objective(model, task, store, stage=STAGES[stage]())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        start = trial.intermediate_values[min(trial.intermediate_values)]
        assert trial.value is not None and trial.value <= start
    classifier = objective.classifier(study)
    assert classifier.is_fitted
    found = classifier.predict_proba([Path(e.text) for e in task.test])
    assert found.shape == (len(task.test), 3)


def make_objective(
    model: TaskModel, task: Task, store: FileSystemArtifactStore, **options: Any
) -> PromptTuningObjective:
    space = PromptSpace(make_towers()[1], 3)
    options = {"n_checked_swaps": 2} | options
    return PromptTuningObjective(model, task, space, artifact_store=store, **options)


# Loading.


@each_family
def test_a_folder_is_the_model_that_was_saved(family: str, folders: dict[str, Path]) -> None:
    loaded = load_pretrained(str(folders[family]), head="clip")
    assert loaded.fingerprint == make_pretrained(family).fingerprint


@pytest.mark.parametrize("part", ["vision_model", "text_model", "logit_scale", "size"])
def test_a_change_of_any_part_changes_the_fingerprint(part: str) -> None:
    model, tokenizer, processor = make_towers()
    if part == "size":
        processor.size = {"shortest_edge": 20}
    for name, weights in model.named_parameters():
        if name.startswith(part):
            weights.data += 0.01
    changed = Pretrained.of(model, tokenizer, image_processor=processor)
    assert changed.fingerprint != make_pretrained().fingerprint


def test_an_exported_classifier_says_the_same_with_and_without_this_package(
    task: Task,
    folders: dict[str, Path],
    store: FileSystemArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = CLIPClassifier(load_pretrained(str(folders["clip"]), head="clip"), task.labels)
    objective = make_objective(model, task, store, stage=STAGES["gradient"]())
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    classifier = objective.classifier(study)
    folder = tmp_path / "colours"
    classifier.export(folder)
    paths = [example.text for example in task.test]
    expected = torch.tensor(classifier.predict_proba(paths))
    assert_same(torch.tensor(load_classifier(folder).predict_proba(paths)), expected)

    card = (folder / "README.md").read_text()
    assert "# An image classifier" in card and "pipeline_tag: image-classification" in card
    _, without = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "optuna" not in without
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(without.replace('["a.jpg", "another.png"]', repr(paths)), names)
    assert_same(torch.tensor(names["logits"]).softmax(-1), expected.float())
    printed = re.findall("'([^']+)'", capsys.readouterr().out)
    assert printed == classifier.predict(paths).tolist()


# Bad input.


def test_without_pillow_the_error_says_what_to_install(
    folders: dict[str, Path], squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for load, kind in (
        (lambda: load_pretrained(str(folders["clip"]), head="clip"), ModelNotFoundError),
        (lambda: load_task(squares), DataError),
    ):
        with pytest.raises(kind, match=r"pip install 'optuna-llm-catalyst\[images\]'"):
            load()


def test_a_model_that_reads_no_images_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="it is a bert model: images are read by CLIP"):
        load_pretrained(str(model_folder), head="clip")
    with pytest.raises(ValueError, match='load_pretrained\\(name, head="clip"\\)'):
        CLIPClassifier(load_pretrained(str(model_folder)), COLOUR_NAMES)
    with pytest.raises(ValueError, match="SequenceClassifier does not read: take CLIPClassifier"):
        SequenceClassifier(make_pretrained(), COLOUR_NAMES)
    with pytest.raises(ValueError, match="CLIPModel cannot .*; for images take CLIPClassifier"):
        DualEncoderClassifier(Pretrained.of(*make_towers()[:2]), COLOUR_NAMES)


PARTS: dict[str, tuple[Callable[[Task], tuple[Any, Task, dict[str, Any]]], str]] = {
    "images for a text model": (
        lambda task: (make_dual(), replace(make_task(), of_images=True), {}),
        "of images, which DualEncoderClassifier does not read: take CLIPClassifier",
    ),
    "texts for CLIP": (
        lambda task: (
            make_clip(labels=task.labels),
            replace(task, train=(Example("where is it?", 0), *task.train), of_images=False),
            {},
        ),
        r"where is it\?: no such file. The model reads images",
    ),
    "pairs for CLIP": (
        lambda task: (
            make_clip(labels=task.labels),
            replace(
                task,
                train=tuple(replace(e, text_pair="b") for e in task.train),
                validation=tuple(replace(e, text_pair="b") for e in task.validation),
                test=(),
            ),
            {},
        ),
        "has a second text, but each is one image",
    ),
    "paths for the LLM": (
        lambda task: (make_clip(labels=task.labels), task, {"share_examples": True}),
        "examples are images, of which it would see the paths: leave it out",
    ),
    "a text prompt": (
        lambda task: (make_clip(labels=task.labels), task, {"n_text_prompts": 1}),
        "CLIPClassifier takes prompts before its labels only",
    ),
    "two sides": (
        lambda task: (make_clip(labels=task.labels), task, {"prompt_kind": TwoSidedPrompt()}),
        "this one takes prompts before: labels",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_what_does_not_fit_is_refused(case: str, task: Task, store: Any) -> None:
    make, message = PARTS[case]
    model, own, options = make(task)
    with pytest.raises(ValueError, match=message):
        make_objective(model, own, store, **options)


INPUTS: dict[str, tuple[Any, str]] = {
    "one path": ("a.png", "`texts` is one text"),
    "no path": ([3], r"`texts\[0\]` is 3, of type int: give the path of an image"),
    "an empty path": ([" "], r"`texts\[0\]` is empty"),
    "a pair": ([("a.png", "b.png")], "give the path of an image"),
    "no file": (["nowhere.png"], "nowhere.png: no such file. The model reads images"),
    "a text": (["x" * 9999], "x: no such file"),
    "no image": ([__file__], "cannot be read as an image"),
}


@pytest.fixture(scope="module")
def classifier(task: Task, tmp_path_factory: pytest.TempPathFactory) -> PromptClassifier:
    store = FileSystemArtifactStore(base_path=str(tmp_path_factory.mktemp("artifacts")))
    objective = make_objective(make_clip(), task, store, stage=GradientStage(n_steps=0))
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    return objective.classifier(study, fit=False)


@pytest.mark.parametrize("case", INPUTS)
def test_what_is_no_image_is_refused(case: str, classifier: PromptClassifier) -> None:
    given, message = INPUTS[case]
    with pytest.raises(ValueError, match=message):
        classifier.predict(given)
