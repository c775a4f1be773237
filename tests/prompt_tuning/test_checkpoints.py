from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest
from safetensors.torch import save_file
import torch

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst.prompt_tuning import load_soft_prompt
from optuna_llm_catalyst.prompt_tuning import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning.checkpoints import folder_store
from optuna_llm_catalyst.prompt_tuning.checkpoints import read
from optuna_llm_catalyst.prompt_tuning.checkpoints import write
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation

from .tiny import LABELS
from .tiny import make_objective
from .tiny import TASK_MODELS


Store = FileSystemArtifactStore
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)


def assert_same_prompt(one: TrainedPrompt, two: TrainedPrompt) -> None:
    """Equal in every field, tensors bit for bit."""
    assert torch.equal(one.embeddings, two.embeddings)
    assert one.embeddings.dtype == two.embeddings.dtype
    assert_same_head(one.head, two.head)
    nothing = torch.empty(0)
    bare = (replace(trained, embeddings=nothing, head={}) for trained in (one, two))
    assert next(bare) == next(bare)


def assert_same_head(one: Head, two: Head) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def trained_prompt(text: str = "people write this", *, with_head: bool = True) -> TrainedPrompt:
    generator = torch.Generator().manual_seed(0)
    head = {
        "weight": torch.randn(1, 3, 4, generator=generator),
        "bias": torch.randn(1, 3, generator=generator),
    }
    return TrainedPrompt(
        embeddings=torch.randn(2, 4, generator=generator),
        head=head if with_head else {},
        text=text,
        token_ids=(7, 9),
        model_name="tiny",
        labels=LABELS,
    )


class Tuned:
    """A study of two stages on disk, and what its observer saw of the best."""

    def __init__(self, model_name: str, store: Store) -> None:
        seen: dict[tuple[int, int], Evaluation] = {}
        self.objective = make_objective(
            model_name,
            store=store,
            observe=lambda trial, e: seen.__setitem__((trial.number, e.index), e),
        )
        self.study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        self.study.optimize(self.objective, n_trials=2)
        self.best = min(
            (e for (number, _), e in seen.items() if number == self.study.best_trial.number),
            key=lambda evaluation: evaluation.loss,
        )

    @property
    def artifact_id(self) -> str:
        return str(self.study.best_trial.user_attrs["soft_prompt_artifact"])


# Laws.


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("text", ["people write this", "", 'a "quoted"\nline\u2028and 日本 🙂'])
def test_a_prompt_is_read_as_it_was_written(text: str, with_head: bool, tmp_path: Path) -> None:
    trained = trained_prompt(text, with_head=with_head)
    write(trained, tmp_path / "file")
    assert_same_prompt(read(tmp_path / "file"), trained)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 4), st.integers(0, 2**32))
def test_any_text_and_any_tensor_survive_the_file(text: str, length: int, seed: int) -> None:
    import tempfile

    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(length, 3, generator=generator)
    trained = replace(trained_prompt(text), embeddings=embeddings)
    with tempfile.TemporaryDirectory() as folder:
        write(trained, Path(folder) / "file")
        assert_same_prompt(read(Path(folder) / "file"), trained)


def test_views_of_other_tensors_are_written_as_what_they_show(tmp_path: Path) -> None:
    trained = trained_prompt()
    view = torch.randn(4, 5).T[1:3]
    write(replace(trained, embeddings=view.requires_grad_()), tmp_path / "file")
    assert torch.equal(read(tmp_path / "file").embeddings, view)


@each_model
def test_the_best_stages_prompt_comes_back_bit_for_bit(model_name: str, store: Store) -> None:
    tuned = Tuned(model_name, store)
    trained = load_soft_prompt(tuned.study, artifact_store=store)
    assert torch.equal(trained.embeddings, tuned.best.prompt)
    assert_same_head(trained.head, tuned.best.head)
    best = tuned.study.best_trial
    assert trained.text == best.user_attrs["prompt"]
    assert trained.token_ids == tuple(best.params[name] for name in sorted(best.params))
    assert (trained.model_name, trained.labels) == ("bert", LABELS)
    assert bool(trained.head) == (model_name == "sequence")


@each_model
def test_a_prompt_that_is_written_and_read_again_has_the_same_test_score(
    model_name: str, store: Store, tmp_path: Path
) -> None:
    tuned = Tuned(model_name, store)
    trained = load_soft_prompt(tuned.study, artifact_store=store)
    write(trained, tmp_path / "copy")
    # Made anew, as in another process.
    objective = make_objective(model_name, store=store)
    assert objective.test(read(tmp_path / "copy")) == tuned.objective.test(trained)


def test_any_stage_of_a_study_can_be_asked_for(store: Store) -> None:
    study = Tuned("dual", store).study
    texts = [trial.user_attrs["prompt"] for trial in study.trials]
    found = [load_soft_prompt(study, trial_number=n, artifact_store=store) for n in (0, 1)]
    assert [trained.text for trained in found] == texts
    assert texts[0] != texts[1]


def test_an_artifact_belongs_to_its_trial(store: Store) -> None:
    tuned = Tuned("dual", store)
    best = tuned.study.best_trial
    [meta] = optuna.artifacts.get_all_artifact_meta(best, storage=tuned.study._storage)
    assert meta.artifact_id == tuned.artifact_id
    assert meta.filename == "soft_prompt.safetensors"


def test_without_a_store_artifacts_are_in_a_folder_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study()
    study.optimize(make_objective(store=None), n_trials=1)
    artifact_id = study.best_trial.user_attrs["soft_prompt_artifact"]
    assert (tmp_path / "llm_catalyst_artifacts" / artifact_id).is_file()
    assert load_soft_prompt(study).text == study.best_trial.user_attrs["prompt"]


def test_a_store_in_a_folder_makes_the_folder(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "some" / "where")
    study = optuna.create_study()
    study.optimize(make_objective(store=store), n_trials=1)
    assert load_soft_prompt(study, artifact_store=folder_store(tmp_path / "some" / "where"))


# What cannot be loaded.


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_kind(path: Path) -> None:
    path.write_text("not a tensor in sight")


def foreign(path: Path) -> None:
    save_file({"prompt": torch.zeros(2, 4)}, str(path))


def foreign_with_metadata(path: Path) -> None:
    save_file({"prompt": torch.zeros(2, 4)}, str(path), metadata={"format": "pt"})


def of_a_later_format(path: Path) -> None:
    facts = {"llm_catalyst": json.dumps({"format": "2"})}
    save_file({"prompt": torch.zeros(2, 4)}, str(path), metadata=facts)


def with_facts_that_are_no_json(path: Path) -> None:
    save_file({"prompt": torch.zeros(2, 4)}, str(path), metadata={"llm_catalyst": "{oops"})


def with_facts_that_are_a_list(path: Path) -> None:
    save_file({"prompt": torch.zeros(2, 4)}, str(path), metadata={"llm_catalyst": "[1]"})


def without_half_of_its_facts(path: Path) -> None:
    facts = {"llm_catalyst": json.dumps({"format": "1", "text": "x"})}
    save_file({"prompt": torch.zeros(2, 4)}, str(path), metadata=facts)


def without_its_prompt(path: Path) -> None:
    write(trained_prompt(), path)
    whole = path.read_bytes()
    # The header is JSON of a given length: a name of the same length keeps it valid.
    path.write_bytes(whole.replace(b'"prompt":', b'"pr0mpt":'))


SPOILERS: list[Callable[[Path], None]] = [
    truncated,
    cut_in_its_header,
    empty,
    of_another_kind,
    foreign,
    foreign_with_metadata,
    of_a_later_format,
    with_facts_that_are_no_json,
    with_facts_that_are_a_list,
    without_half_of_its_facts,
    without_its_prompt,
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_file_that_is_spoilt_is_refused_by_its_path(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "soft_prompt.safetensors"
    write(trained_prompt(), path)
    spoil(path)
    with pytest.raises(CheckpointError, match=r"soft_prompt\.safetensors: no"):
        read(path)


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "nowhere")


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


def test_an_artifact_that_was_cut_short_is_refused(store: Store) -> None:
    tuned = Tuned("dual", store)
    truncated(Path(store._base_path) / tuned.artifact_id)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_soft_prompt(tuned.study, artifact_store=store)


def test_an_artifact_that_is_gone_is_missed_by_its_trial(store: Store) -> None:
    tuned = Tuned("dual", store)
    (Path(store._base_path) / tuned.artifact_id).unlink()
    with pytest.raises(CheckpointError, match="of trial [01] is not in this artifact store: give"):
        load_soft_prompt(tuned.study, artifact_store=store)


def test_another_store_than_the_studys_is_told_from_a_trial_without_a_prompt(
    store: Store, tmp_path: Path
) -> None:
    study = Tuned("dual", store).study
    study.add_trial(optuna.create_trial(value=9.0))
    with pytest.raises(CheckpointError, match="not in this artifact store"):
        load_soft_prompt(study, artifact_store=folder_store(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="trial 2 has no soft prompt artifact"):
        load_soft_prompt(study, trial_number=2, artifact_store=store)
    with pytest.raises(CheckpointError, match="has no trial 3"):
        load_soft_prompt(study, trial_number=3, artifact_store=store)
