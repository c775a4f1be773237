from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
import errno
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import BinaryIO

from hypothesis import given
from hypothesis import strategies as st
import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.checkpoints import read
from optuna_llm_catalyst.prompt_tuning.checkpoints import write
from optuna_llm_catalyst.prompt_tuning.models import SOFT
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import LABELS
from .tiny import make_objective
from .tiny import TASK_MODELS


ARTIFACT = "soft_prompt_artifact"
Store = FileSystemArtifactStore
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)


def assert_same_tensors(one: Prompt, two: Prompt) -> None:
    """Bit for bit, and of one kind."""
    assert one.kind == two.kind
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name])
        assert tensor.dtype == two.tensors[name].dtype


def assert_same_prompt(one: TrainedPrompt, two: TrainedPrompt) -> None:
    assert one.facts == two.facts
    assert_same_tensors(one.prompt, two.prompt)


def trained_prompt(text: str = "people write this", **tensors: Tensor) -> TrainedPrompt:
    """A made-up one of two virtual tokens of width 4; ``tensors`` replace its own."""
    generator = torch.Generator().manual_seed(0)
    own = {
        "texts": torch.randn(1, 2, 4, generator=generator),
        "head.weight": torch.randn(1, 3, 4, generator=generator),
        "head.bias": torch.randn(1, 3, generator=generator),
    }
    facts = PromptFacts(text, (7, 9), LABELS, "tiny", "0123456789abcdef")
    return TrainedPrompt(Prompt(SOFT, own | tensors), facts)


class Tuned:
    """A study of two stages on disk, and what its observer saw of the best."""

    def __init__(self, model_name: str, store: Store) -> None:
        seen: list[tuple[int, Evaluation]] = []
        self.objective = make_objective(
            model_name, store=store, observe=lambda trial, e: seen.append((trial.number, e))
        )
        self.study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        self.study.optimize(self.objective, n_trials=2)
        self.best = min(
            (e for number, e in seen if number == self.study.best_trial.number),
            key=lambda evaluation: evaluation.loss,
        )

    def path(self, number: int, store: Store) -> Path:
        """Where a trial's artifact is."""
        return Path(store._base_path) / self.study.trials[number].user_attrs[ARTIFACT]


def altered(study: optuna.Study, change: Callable[[FrozenTrial], object]) -> optuna.Study:
    """The study with its finished trials changed."""
    copy = optuna.create_study()
    for trial in study.get_trials():
        change(trial)
        copy.add_trial(trial)
    return copy


# Laws.


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("text", ["people write this", "", 'a "quoted"\nline\u2028and 日本 🙂'])
def test_a_prompt_is_read_as_it_was_written(text: str, with_head: bool, tmp_path: Path) -> None:
    trained = trained_prompt(text)
    if not with_head:
        bare = Prompt(SOFT, {"texts": trained.prompt.tensors["texts"]})
        trained = replace(trained, prompt=bare)
    write(trained, tmp_path / "file")
    assert_same_prompt(read(tmp_path / "file"), trained)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 4), st.integers(0, 2**32))
def test_any_text_and_any_tensor_survive_the_file(text: str, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = trained_prompt(text, texts=torch.randn(1, length, 3, generator=generator))
    trained = replace(trained, facts=replace(trained.facts, token_ids=tuple(range(length))))
    with tempfile.TemporaryDirectory() as folder:
        write(trained, Path(folder) / "file")
        assert_same_prompt(read(Path(folder) / "file"), trained)


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    view = torch.randn(4, 5).T[None, 1:3]
    write(trained_prompt(texts=view.requires_grad_()), tmp_path / "file")
    assert torch.equal(read(tmp_path / "file").prompt.words(), view)


@each_model
def test_the_best_prompt_comes_back_bit_for_bit(model_name: str, store: Store) -> None:
    tuned = Tuned(model_name, store)
    trained = load_soft_prompt(tuned.study, artifact_store=store)
    assert_same_tensors(trained.prompt, tuned.best.prompt)
    best, facts = tuned.study.best_trial, trained.facts
    assert facts.text == best.user_attrs["prompt"]
    assert facts.token_ids == tuple(best.params[name] for name in sorted(best.params))
    assert (facts.model_name, facts.labels) == ("bert", LABELS)
    assert facts.fingerprint == TASK_MODELS[model_name]().fingerprint
    assert bool(trained.prompt.head) == (model_name == "sequence")


@each_model
def test_a_copy_has_the_same_test_score(model_name: str, store: Store, tmp_path: Path) -> None:
    tuned = Tuned(model_name, store)
    trained = load_soft_prompt(tuned.study, artifact_store=store)
    write(trained, tmp_path / "copy")
    # Made anew, as in another process.
    objective = make_objective(model_name, store=store)
    assert objective.test(read(tmp_path / "copy")) == tuned.objective.test(trained)


def test_any_stage_can_be_loaded(store: Store) -> None:
    study = Tuned("dual", store).study
    texts = [trial.user_attrs["prompt"] for trial in study.trials]
    found = [load_soft_prompt(study, trial_number=n, artifact_store=store) for n in (0, 1)]
    assert [trained.facts.text for trained in found] == texts
    assert texts[0] != texts[1]


def test_an_artifact_belongs_to_its_trial(store: Store) -> None:
    study = Tuned("dual", store).study
    best = study.best_trial
    [meta] = optuna.artifacts.get_all_artifact_meta(best, storage=study._storage)
    assert meta.artifact_id == best.user_attrs[ARTIFACT]
    assert meta.filename == "soft_prompt.safetensors"


def test_the_default_store_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study()
    study.optimize(make_objective(store=None), n_trials=1)
    artifact_id = study.best_trial.user_attrs[ARTIFACT]
    assert (tmp_path / "llm_catalyst_artifacts" / artifact_id).is_file()
    assert load_soft_prompt(study).facts.text == study.best_trial.user_attrs["prompt"]


def test_a_folder_store_makes_its_folder(tmp_path: Path) -> None:
    study = optuna.create_study()
    study.optimize(make_objective(store=folder_store(tmp_path / "some" / "where")), n_trials=1)
    assert load_soft_prompt(study, artifact_store=folder_store(tmp_path / "some" / "where"))


# Files that are not ours, or not whole.


def facts_of(tensors: dict[str, Tensor], path: Path, **facts: object) -> None:
    """A file of these tensors with the metadata of a good one, some of it replaced."""
    good = {
        "text": "people write this",
        "token_ids": [7, 9],
        "labels": list(LABELS),
        "model_name": "tiny",
        "fingerprint": "0123456789abcdef",
    }
    metadata = {"format": "2", "kind": "soft", "facts": good | facts}
    save_file(tensors, str(path), metadata={"llm_catalyst": json.dumps(metadata)})


def with_metadata(text: str, path: Path) -> None:
    save_file({"texts": torch.zeros(1, 2, 4)}, str(path), metadata={"llm_catalyst": text})


def replaced(old: bytes, new: bytes, path: Path) -> None:
    # The header is JSON of a given length: a replacement of the same length keeps it valid.
    assert len(old) == len(new)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))


SPOILERS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut_in_its_header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "of_another_kind_of_file": lambda path: path.write_text("not a tensor in sight"),
    "foreign": lambda path: save_file({"texts": torch.zeros(1, 2, 4)}, str(path)),
    "foreign_with_metadata": lambda path: save_file(
        {"texts": torch.zeros(1, 2, 4)}, str(path), metadata={"format": "pt"}
    ),
    "of_an_earlier_format": lambda path: with_metadata('{"format": "1", "text": "x"}', path),
    "of_a_later_format": lambda path: replaced(rb"\"format\": \"2\"", rb"\"format\": \"3\"", path),
    "of_an_unknown_kind": lambda path: replaced(
        rb"\"kind\": \"soft\"", rb"\"kind\": \"sOft\"", path
    ),
    "metadata_that_is_no_json": lambda path: with_metadata("{oops", path),
    "metadata_that_is_a_list": lambda path: with_metadata("[1]", path),
    "metadata_that_is_deep": lambda path: with_metadata("[" * 100_000, path),
    "metadata_without_facts": lambda path: with_metadata('{"format": "2", "kind": "soft"}', path),
    "without_its_prompt": lambda path: replaced(b'"texts":', b'"te_ts":', path),
    "without_tensors": lambda path: facts_of({}, path),
    "a_number_for_a_prompt": lambda path: facts_of({"texts": torch.tensor(1.0)}, path),
    "a_vector_for_a_prompt": lambda path: facts_of({"texts": torch.zeros(1)}, path),
    "two_prompts": lambda path: facts_of({"texts": torch.zeros(2, 2, 4)}, path),
    "a_prompt_without_its_dimension": lambda path: facts_of({"texts": torch.zeros(2, 4)}, path),
    "a_head_for_two": lambda path: facts_of(
        {"texts": torch.zeros(1, 2, 4), "head.bias": torch.zeros(2, 3)}, path
    ),
    "too_many_virtual_tokens": lambda path: facts_of({"texts": torch.zeros(1, 3000, 4)}, path),
    "nan": lambda path: facts_of({"texts": torch.full((1, 2, 4), torch.nan)}, path),
    "an_infinite_head": lambda path: facts_of(
        {"texts": torch.zeros(1, 2, 4), "head.bias": torch.full((1, 3), torch.inf)}, path
    ),
    "labels_that_are_numbers": lambda path: facts_of(
        {"texts": torch.zeros(1, 2, 4)}, path, labels=[1, 2, 3]
    ),
    "token_ids_that_are_texts": lambda path: facts_of(
        {"texts": torch.zeros(1, 2, 4)}, path, token_ids=["7", "9"]
    ),
}


def test_the_file_that_is_spoilt_below_is_good(tmp_path: Path) -> None:
    facts_of({"texts": torch.zeros(1, 2, 4)}, tmp_path / "file")
    assert read(tmp_path / "file").facts == trained_prompt().facts


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_spoilt_file_is_refused_by_its_path(spoiler: str, tmp_path: Path) -> None:
    path = tmp_path / "soft_prompt.safetensors"
    write(trained_prompt(), path)
    SPOILERS[spoiler](path)
    with pytest.raises(CheckpointError, match=r"soft_prompt\.safetensors: ") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_prompt_with_a_layer_missing_is_refused(store: Store) -> None:
    objective = make_objective(store=store, prompt_kind=DeepPrompt())
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    found = load_soft_prompt(study, artifact_store=store)
    assert objective.test(found).loss > 0
    tensors = {name: t for name, t in found.prompt.tensors.items() if name != "labels.1"}
    spoilt = replace(found, prompt=Prompt(found.prompt.kind, tensors))
    with pytest.raises(CheckpointError, match="lacks 'labels.1', which a deep prompt of"):
        objective.test(spoilt)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "nowhere")


# Artifacts that are not the trial's.


def swapped(own: Path, other: Path) -> None:
    spare = own.with_name("spare")
    own.rename(spare)
    other.rename(own)
    spare.rename(other)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Path, Path], None]:
    """The artifact with another prompt in it."""

    def tamper(own: Path, other: Path) -> None:
        trained = read(own)
        tensors = {"labels": change(trained.prompt.tensors["labels"])}
        write(replace(trained, prompt=Prompt(SOFT, tensors)), own)

    return tamper


def spoilt(spoiler: str) -> Callable[[Path, Path], None]:
    def tamper(own: Path, other: Path) -> None:
        SPOILERS[spoiler](own)

    return tamper


def flat(own: Path, other: Path) -> None:
    """Of the shape [2, d], with everything else as it was."""
    from safetensors import safe_open

    with safe_open(str(own), framework="pt") as file:
        metadata = file.metadata()
    save_file({"labels": load_file(own)["labels"][0, :2]}, str(own), metadata=metadata)


def integer_labels(own: Path, other: Path) -> None:
    trained = read(own)
    facts = replace(trained.facts, labels=(0, 1, 2))
    write(replace(trained, facts=facts), own)


def of_3000_tokens(own: Path, other: Path) -> None:
    trained = read(own)
    prompt = Prompt(SOFT, {"labels": torch.zeros(1, 3000, 32)})
    facts = replace(trained.facts, token_ids=(7,) * 3000)
    write(TrainedPrompt(prompt, facts), own)


def a_directory(own: Path, other: Path) -> None:
    own.unlink()
    own.mkdir()


TAMPERINGS: dict[str, Callable[[Path, Path], object]] = {
    "swapped": swapped,
    "nan": changed(lambda rows: torch.full_like(rows, torch.nan)),
    "infinite": changed(lambda rows: rows / 0),
    "flat": flat,
    "too_short": changed(lambda rows: rows[:, :2]),
    "3000_rows": changed(lambda rows: rows[:, :1].expand(1, 3000, -1)),
    "3000_tokens": of_3000_tokens,
    "empty": spoilt("empty"),
    "truncated": spoilt("truncated"),
    "not_tensors": spoilt("of_another_kind_of_file"),
    "integer_labels": integer_labels,
    "a_directory": a_directory,
    "gone": lambda own, other: own.unlink(),
}
ONLY_THE_CHECKSUM_TELLS: dict[str, Callable[[Path, Path], object]] = {
    "one_bit": changed(lambda rows: rows * (1 + 2**-23)),
    "another_width": changed(lambda rows: rows[..., :16]),
}


@pytest.mark.parametrize(
    ("tampering", "has_checksum"),
    [(name, True) for name in TAMPERINGS | ONLY_THE_CHECKSUM_TELLS]
    + [(name, False) for name in TAMPERINGS],
)
def test_another_artifact_is_refused(tampering: str, has_checksum: bool, store: Store) -> None:
    """By the numbers of its trial and the artifact; nothing is trained from it either."""
    tuned = Tuned("dual", store)
    study = tuned.study
    best = study.best_trial
    if not has_checksum:
        study = altered(study, lambda trial: trial.system_attrs.pop("llm_catalyst:soft_prompt"))
    (TAMPERINGS | ONLY_THE_CHECKSUM_TELLS)[tampering](
        tuned.path(best.number, store), tuned.path(1 - best.number, store)
    )
    name = rf"^the soft prompt of trial {best.number} \(artifact {best.user_attrs[ARTIFACT]}\)"
    with pytest.raises(CheckpointError, match=name) as raised:
        load_soft_prompt(study, artifact_store=store)
    assert "\n" not in str(raised.value)
    assert str(Path(tempfile.gettempdir()) / "tmp") not in str(raised.value)
    with pytest.raises(CheckpointError, match=name):
        tuned.objective.refine(study, n_steps=1)
    assert len(study.trials) == 2


def test_the_artifact_of_a_stage_of_the_same_words_is_refused(store: Store) -> None:
    """A refine has the tokens of its stage: the record alone tells whose artifact it is."""
    tuned = Tuned("dual", store)
    refined = tuned.objective.refine(tuned.study, n_steps=3)
    source = refined.user_attrs["refined_from"]
    study = altered(
        tuned.study,
        lambda trial: trial.user_attrs.update({ARTIFACT: refined.user_attrs[ARTIFACT]}),
    )
    with pytest.raises(CheckpointError, match=f"trial {source} .* is not the one"):
        load_soft_prompt(study, trial_number=source, artifact_store=store)


# Nothing to load.


def test_a_study_without_a_complete_stage_has_no_prompt(store: Store) -> None:
    study = optuna.create_study(study_name="new")
    study.ask()
    with pytest.raises(CheckpointError, match="'new' has no complete stage yet"):
        load_soft_prompt(study, artifact_store=store)


def test_looking_for_a_prompt_makes_no_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Tuned("dual", store).study
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not in this artifact store"):
        load_soft_prompt(study)
    assert not list(Path().iterdir())


def test_a_folder_that_cannot_be_made_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no folder for artifacts"):
        folder_store(tmp_path / "file" / "folder")


def test_another_store_is_told_from_no_artifact(store: Store, tmp_path: Path) -> None:
    study = Tuned("dual", store).study
    study.add_trial(optuna.create_trial(value=9.0))
    with pytest.raises(CheckpointError, match="of trial [01] .* not in this artifact store: give"):
        load_soft_prompt(study, artifact_store=folder_store(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="trial 2 has no soft prompt artifact"):
        load_soft_prompt(study, trial_number=2, artifact_store=store)
    with pytest.raises(CheckpointError, match="has no trial 3"):
        load_soft_prompt(study, trial_number=3, artifact_store=store)


# Nowhere to store.


class FullStore(FileSystemArtifactStore):
    """A store on a disk that fills up while a file is written."""

    is_full = False

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(artifact_id, content_body)


def fill_up(store: FullStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.is_full = True


def remove_folder(store: FullStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(store._base_path)


def replace_folder_by_file(store: FullStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as a read-only folder does, for root as well."""
    folder = Path(store._base_path)
    if folder.is_dir():
        shutil.rmtree(folder)
        folder.touch()


def lose_temporary_folder(store: FullStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(Path(store._base_path) / "gone"))


FAULTS = [fill_up, remove_folder, replace_folder_by_file, lose_temporary_folder]
Fault = Callable[[FullStore, pytest.MonkeyPatch], None]


def tuned_until_fault(
    fault: Fault, store: FullStore, monkeypatch: pytest.MonkeyPatch
) -> tuple[optuna.Study, PromptTuningObjective]:
    """A study of three stages; the store breaks in the middle of the second."""

    def observe(trial: BaseTrial, evaluation: Evaluation) -> None:
        if trial.number == 1:
            fault(store, monkeypatch)

    objective = make_objective("sequence", store=store, observe=observe)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    return study, objective


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_outlives_its_store(
    fault: Fault, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.enable_propagation()
    try:
        study, objective = tuned_until_fault(fault, FullStore(store._base_path), monkeypatch)
    finally:
        optuna.logging.disable_propagation()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert [ARTIFACT in trial.user_attrs for trial in study.trials] == [True, False, False]
    assert [number for _, number in objective.prompts.unsaved] == [1, 2]
    for (_, number), trained in objective.prompts.unsaved.items():
        trial = study.trials[number]
        assert trained.facts.text == trial.user_attrs["prompt"]
        assert objective.test(trained).n_examples == 18
    messages = sorted({r.getMessage() for r in caplog.records if r.levelname == "ERROR"})
    assert len(messages) == 2
    for number, message in zip((1, 2), messages, strict=True):
        assert f"the soft prompt of trial {number} cannot be stored" in message
        assert "It is kept in memory only, until this process ends" in message


def test_unsaved_prompts_can_be_written_elsewhere(store: Store, tmp_path: Path) -> None:
    objective = make_objective(store=store)
    study = optuna.create_study()
    Path(store._base_path).rmdir()
    study.optimize(objective, n_trials=2)
    with pytest.raises(CheckpointError, match="nowhere.*cannot be written"):
        objective.prompts.save_unsaved(tmp_path / "nowhere")
    paths = objective.prompts.save_unsaved(tmp_path)
    for number, path in enumerate(paths):
        kept = objective.prompts.load(study, number)
        assert objective.test(read(path)) == objective.test(kept)


def test_an_unsaved_prompt_can_be_refined(store: Store) -> None:
    full_store = FullStore(store._base_path)
    full_store.is_full = True
    objective = make_objective(store=full_store)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    refined = objective.refine(study, n_steps=4)
    assert refined.intermediate_values[0] == study.trials[0].value
    assert [number for _, number in objective.prompts.unsaved] == [0, 1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_store_is_found_before_a_stage(
    fault: Fault, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_store = FullStore(store._base_path)
    objective = make_objective(store=full_store)
    fault(full_store, monkeypatch)
    with pytest.raises(CheckpointError, match="cannot be stored, so no stage was started: "):
        objective.prompts.check()


def test_checking_a_store_leaves_nothing_behind(store: Store) -> None:
    make_objective(store=store).prompts.check()
    assert not list(Path(store._base_path).iterdir())
