"""Low-rank prompts: a gate of bounded rank for each input, from its encoding without a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst import CheckpointError
from optuna_llm_catalyst.prompt_tuning import BlackBoxModel
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import DistilledStage
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.checkpoints import read
from optuna_llm_catalyst.prompt_tuning.checkpoints import write
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts import Tensors
from optuna_llm_catalyst.prompt_tuning.prompts.lowrank import factors
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage

from .test_causal_lm import classifier as make_causal
from .test_masked_lm import classifier as make_masked
from .tiny import LABELS
from .tiny import make_examples
from .tiny import make_objective
from .tiny import make_space
from .tiny import make_task
from .tiny import TASK_MODELS


MODELS: dict[str, Callable[[], TaskModel]] = {
    **TASK_MODELS,
    "masked": make_masked,
    "causal": lambda: make_causal(words="one token"),
}
each_model = pytest.mark.parametrize("model_name", MODELS)
KIND = LowRankPrompt(rank=2, hidden=5)
TWO_SIDED = TwoSidedLowRankPrompt(rank=2, hidden=5)
IDS = [[7, 9, 30], [12, 12, 5]]
STAGE = GradientStage(n_steps=4, lr=0.02, gate_lr=0.02, eval_every=2, batch_size=5)


def encoded(model: TaskModel, n: int = 9) -> Split:
    return model.encode(make_examples(n, seed=3))


def moved(prompt: Prompt, seed: int = 0) -> Prompt:
    """Prompts whose every number was changed, so that gates differ between inputs."""
    generator = torch.Generator().manual_seed(seed)
    return prompt.map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator))


def own_split(model: TaskModel, texts: Split) -> Split:
    """The inputs of the model's usual side."""
    classes: Split | None = getattr(model, "_classes", None)
    return texts if classes is None else classes


# The gate.


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_input_has_a_gate_of_that_rank(rank: int) -> None:
    """Computed one prompt and one input at a time."""
    kind, model = LowRankPrompt(rank, hidden=6), MODELS["sequence"]()
    split = encoded(model, 6)
    prompt = moved(model.start([[7, 9, 30, 31], [12, 12, 5, 8]], split, kind))
    [(layer, found)] = prompt.layers("texts", split).items()
    u, v = factors(prompt.tensors, "texts", split.encodings())
    assert layer == 0 and found.shape == (2, 6, 4, 32)
    for p in range(2):
        for b in range(6):
            rows = slowly(prompt[[p]].tensors, split.encodings()[b], length=4)
            torch.testing.assert_close(u[p, b] @ v[p, b].T, rows)
            torch.testing.assert_close(
                found[p, b], 2 * prompt.tensors["texts"][p] * torch.sigmoid(rows)
            )
            assert torch.linalg.matrix_rank(rows.double(), rtol=1e-5) == rank
            gate = torch.sigmoid(rows)
            assert 0 < gate.min() and gate.max() < 1


def slowly(tensors: Tensors, encoding: Tensor, *, length: int) -> Tensor:
    """``U V^T`` of one input, (L, d)."""
    own = {name.removeprefix("texts.gate."): tensor[0] for name, tensor in tensors.items()}

    def network(part: str) -> Tensor:
        hidden = F.linear(
            encoding * len(encoding) ** 0.5, own[f"{part}.down"], own[f"{part}.down_bias"]
        )
        return F.linear(torch.tanh(hidden), own[f"{part}.up"], own[f"{part}.up_bias"])

    u, v = network("u").view(length, -1), network("v").view(32, -1)
    return torch.stack([torch.stack([a @ b for b in v]) for a in u])


@pytest.mark.parametrize(("rank", "hidden"), [(1, 3), (4, 256)])
@each_model
def test_there_are_as_many_numbers_as_the_formula_says(
    model_name: str, rank: int, hidden: int
) -> None:
    model = MODELS[model_name]()
    prompt = model.start(IDS[:1], encoded(model), LowRankPrompt(rank, hidden))
    h = d = 32
    u, v = (hidden * n * rank + n * rank for n in (3, d))
    n_numbers = sum(tensor.numel() for tensor in prompt.trained.values())
    assert n_numbers == 2 * (h * hidden + hidden) + u + v + 3 * d


def test_embeddings_may_be_narrower_than_encodings() -> None:
    model = TASK_MODELS["sequence"]("narrow")
    split = encoded(model)
    prompt = model.start(IDS, split, KIND)
    assert prompt.words().shape == (2, 3, 16)
    assert prompt.tensors["texts.gate.u.down"].shape == (2, 5, 32)
    torch.testing.assert_close(
        model.log_probs(prompt, split), model.log_probs(model.start(IDS, split), split)
    )


# At the start.


@pytest.mark.parametrize(
    ("low_rank", "soft", "model_name"),
    [(KIND, SoftPrompt(), name) for name in MODELS] + [(TWO_SIDED, TwoSidedPrompt(), "dual")],
    ids=[*MODELS, "both sides"],
)
def test_an_untrained_one_is_the_soft_prompt_of_its_words(
    low_rank: PromptKind, soft: PromptKind, model_name: str
) -> None:
    model = MODELS[model_name]()
    split = encoded(model)
    one, two = (model.start(IDS, split, kind) for kind in (low_rank, soft))
    torch.testing.assert_close(model.log_probs(one, split), model.log_probs(two, split))
    assert torch.equal(one.words(), two.words())


def test_a_start_is_the_same_for_each_prompt_and_each_time() -> None:
    model = MODELS["sequence"]()
    split = encoded(model)
    one, two = model.start(IDS, split, KIND), model.start(IDS[::-1], split, KIND)
    for name in one.trained:
        assert torch.equal(one.tensors[name], two.tensors[name].flip(0))
        if name != "texts":
            assert torch.equal(one.tensors[name][0], one.tensors[name][1])


@each_model
def test_gradients_reach_the_gate_at_the_first_step(model_name: str) -> None:
    model = MODELS[model_name]()
    split = encoded(model)
    prompt = model.start(IDS[:1], split, KIND).map(lambda t: t.clone().requires_grad_())
    F.nll_loss(model.log_probs(prompt, split)[0], split.labels).backward()
    for name in ("u.up", "u.up_bias"):
        [found] = [t for n, t in prompt.trained.items() if n.endswith(f".gate.{name}")]
        assert found.grad is not None and found.grad.abs().max() > 0


# Trained.


@each_model
def test_other_inputs_have_other_virtual_tokens(model_name: str) -> None:
    """After a stage; the same input has the same ones, and the model is as it was."""
    model = MODELS[model_name]()
    split = encoded(model)
    encoder = model.encoder  # type: ignore[attr-defined]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    start = model.start(IDS[:1], split, KIND)
    run = Run(model, start, split, split)
    with torch.random.fork_rng():
        before = evaluate(model, start, split).loss[0]
        result = replace(STAGE, n_steps=12).run(run)
    assert result.best.loss < before
    own = own_split(model, split)
    [tokens] = result.best.prompt.layers(model.placement.sides[0], own.select([0, 1, 0])).values()
    # But for rounding, which may depend on a row's place in a batch.
    torch.testing.assert_close(tokens[:, 0], tokens[:, 2], rtol=0, atol=1e-5)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])
    assert all(torch.equal(tensor, weights[n]) for n, tensor in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())


@each_model
def test_many_are_one_at_a_time(model_name: str) -> None:
    """Texts and prompts, whatever is asked for first."""
    model = MODELS[model_name]()
    split, fresh = encoded(model), encoded(model)
    prompt = moved(model.start(IDS, split, KIND))
    together = model.log_probs(prompt, split)  # (2, 9, C)
    alone = [
        torch.cat([model.log_probs(prompt[[p]], fresh.select([b])) for b in range(9)], dim=1)
        for p in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("model_name", ["masked", "causal"])
def test_language_models_in_half_precision_take_it(model_name: str) -> None:
    model: Any = MODELS[model_name]()
    for module in (model.encoder, model._words):
        module.to(torch.bfloat16)
    split = encoded(model)
    prompt = moved(model.start(IDS, split, KIND))
    assert model.log_probs(prompt, split).isfinite().all()


def test_a_kept_text_prompt_is_what_it_was_when_it_was_trained() -> None:
    model = MODELS["dual"]()
    objective_split = encoded(model)
    both = moved(model.start(IDS[:1], objective_split, TWO_SIDED))
    texts = Prompt(KIND, {n: t for n, t in both.tensors.items() if n.startswith("texts")})
    labels = Prompt(KIND, {n: t for n, t in both.tensors.items() if n.startswith("labels")})
    under = model.encode(make_examples(9, seed=3), under=texts)  # type: ignore[call-arg]
    torch.testing.assert_close(
        model.log_probs(labels, under), model.log_probs(both, objective_split)
    )
    plain = model.log_probs(labels, objective_split)
    assert not torch.allclose(model.log_probs(labels, under), plain, atol=1e-3)


@pytest.mark.parametrize("kind", [KIND, TWO_SIDED], ids=["one side", "both sides"])
@pytest.mark.parametrize("fast", ["soft part", "gate"])
def test_soft_part_and_gate_have_their_own_rates(fast: str, kind: PromptKind) -> None:
    model = MODELS["dual"]()
    split = encoded(model)
    start = model.start(IDS[:1], split, kind)
    lr, gate_lr = (0.05, 1e-9) if fast == "soft part" else (1e-9, 0.05)
    stage = GradientStage(n_steps=2, lr=lr, text_lr=lr, gate_lr=gate_lr, eval_every=1)
    seen: list[Prompt] = []

    def observe(evaluation: Evaluation) -> bool:
        seen.append(evaluation.prompt)
        return False

    stage.run(Run(model, start, split, split, observe=observe))
    for name, tensor in seen[-1].tensors.items():
        has_moved = (tensor - start.tensors[name]).abs().max().item() > 1e-4
        assert has_moved == ((".gate." in name) == (fast == "gate")), name


# What it costs.


@each_model
def test_inputs_are_read_without_a_prompt_once_and_only_for_it(model_name: str) -> None:
    model = MODELS[model_name]()
    split = encoded(model)
    soft, deep, low_rank = (
        model.start(IDS, split, kind) for kind in (SoftPrompt(), DeepPrompt(), KIND)
    )
    split = encoded(model)  # Fitting a head asked for encodings, too.
    n_read = len(own_split(model, split))
    is_known = model_name == "dual"  # Class names are the model's, not the split's.
    counts = []
    for prompt in (soft, deep, low_rank, low_rank):
        with model.metered() as passes:
            model.log_probs(prompt, split)
            model.log_probs(prompt, split.select([4, 1]))
        counts.append((passes.forward, passes.sequences))
    n_sequences = 2 * (n_read + (n_read if is_known else 2))
    usual, first = (2, n_sequences), (3, n_sequences + n_read)
    assert counts == [usual, usual, first, usual]


def test_texts_features_are_their_encodings() -> None:
    model = MODELS["dual"]()
    split = encoded(model)
    both = model.start(IDS[:1], split, TWO_SIDED)
    model.log_probs(both, split)
    with model.metered() as passes:
        model.log_probs(both, encoded(model, 6))
    assert passes.sequences == 6 + 6 + len(LABELS)
    assert torch.equal(split.encodings(), split.rows("features"))


# Files and studies.


def trained_prompt(model: TaskModel, prompt: Prompt) -> TrainedPrompt:
    facts = PromptFacts("a b c", tuple(IDS[0]), LABELS, model.name, model.fingerprint)
    return TrainedPrompt(prompt, facts)


@pytest.mark.parametrize("kind", [KIND, LowRankPrompt(1, 3), TWO_SIDED], ids=str)
def test_a_file_gives_the_prompt_of_its_rank_back(kind: PromptKind, tmp_path: Path) -> None:
    model = MODELS["dual"]()
    split = encoded(model)
    prompt = moved(model.start(IDS[:1], split, kind))
    write(trained_prompt(model, prompt), tmp_path / "file")
    again = read(tmp_path / "file").prompt
    assert again.kind == kind
    assert again.tensors.keys() == prompt.tensors.keys()
    assert all(torch.equal(t, again.tensors[name]) for name, t in prompt.tensors.items())
    torch.testing.assert_close(model.log_probs(again, split), model.log_probs(prompt, split))


def test_a_file_without_a_gate_is_refused(tmp_path: Path) -> None:
    model = MODELS["dual"]()
    prompt = Prompt(KIND, {"labels": torch.zeros(1, 3, 32)})
    write(trained_prompt(model, prompt), tmp_path / "file")
    with pytest.raises(CheckpointError, match="no soft prompt of this package"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("model_name", "n_text_prompts"), [("dual", 1), ("dual", 0), ("sequence", 0)]
)
def test_a_study_of_it_is_used_as_any_other(
    model_name: str, n_text_prompts: int, store: FileSystemArtifactStore, tmp_path: Path
) -> None:
    """Of stages of two ranks, whose tensors are of two shapes."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for rank in (2, 1):
        objective = make_objective(
            model_name,
            store=store,
            prompt_kind=LowRankPrompt(rank, hidden=5),
            n_text_prompts=n_text_prompts,
            text_stage=STAGE,
            later_texts="turns",
        )
        study.optimize(objective, n_trials=1 + n_text_prompts)
    classifier = objective.classifier(study)
    texts = ["the wolf", "some bread over there", "people saw"]
    found = classifier.predict_proba(texts)
    files = classifier.export(tmp_path / "out")
    again = load_classifier(tmp_path / "out", model=objective.model)
    np.testing.assert_allclose(again.predict_proba(texts), found, rtol=1e-5, atol=1e-6)
    assert len(classifier.ensemble.numbers) == 2 * (1 + n_text_prompts)
    has_matrix = any(path.name == "class_matrix.npy" for path in files)
    assert has_matrix == (model_name == "dual" and not n_text_prompts)
    if model_name == "sequence":
        [group] = classifier.ensemble.groups
        split = objective.data.split("test")
        each = [objective.model.log_probs(member.prompt, split)[0] for member in group.members]
        torch.testing.assert_close(
            torch.from_numpy(classifier.predict_proba([e.text for e in objective.task.test])),
            torch.stack(each).mean(0).double().softmax(-1).detach(),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "stage",
    [BlackBoxStage(), DistilledStage(), ZerothOrderStage()],
    ids=lambda stage: type(stage).__name__,
)
def test_stages_without_gradients_cannot_train_it(
    stage: Stage, store: FileSystemArtifactStore
) -> None:
    """Refused at construction, in a trial that chooses the stage, and by the model itself."""
    message = f"{type(stage).__name__} searches around embeddings .* take GradientStage"
    options: dict[str, Any] = {"store": store, "prompt_kind": KIND}
    with pytest.raises(ValueError, match=message):
        make_objective(stage=stage, **options)
    with pytest.raises(ValueError, match=message):
        make_objective(text_stage=stage, n_text_prompts=1, **options)
    study = optuna.create_study()
    with pytest.raises(ValueError, match=message):
        study.optimize(make_objective(make_stage=lambda _: stage, **options), n_trials=1)
    model = MODELS["dual"]()
    split = encoded(model)
    with pytest.raises(ValueError, match="weights that stand among nothing"):
        stage.run(Run(model, model.start(IDS[:1], split, KIND), split, split))


def test_a_model_without_encodings_cannot_take_it() -> None:
    def nothing(rows: object, examples: object) -> object:
        raise AssertionError

    table = np.ones((make_space().vocab_size, 2))
    model = BlackBoxModel(nothing, table, LABELS, name="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoding of each input .* this model does not give"):
        PromptTuningObjective(
            model, make_task(), make_space(), stage=GradientStage(), prompt_kind=KIND
        )


@pytest.mark.parametrize("name", ["rank", "hidden"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        LowRankPrompt(**{name: 0})
