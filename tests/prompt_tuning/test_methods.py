"""The laws of a stage, for every method, kind of prompt and task model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning import ContrastiveStage
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import DeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import LowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedDeepPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedLowRankPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import TwoSidedPrompt
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages import DistilledStage
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
from optuna_llm_catalyst.prompt_tuning.stages import ZerothOrderStage

from .test_causal_lm import classifier as causal_lm
from .test_families import bert
from .test_families import COMMON
from .test_families import make
from .test_masked_lm import classifier as masked_lm
from .test_stages import assert_bit_identical
from .test_stages import assert_same_prompt
from .tiny import LABELS
from .tiny import make_examples
from .tiny import make_space
from .tiny import TASK_MODELS


METHODS: dict[str, Stage] = {
    "gradient": GradientStage(
        n_steps=5, lr=0.02, gate_lr=0.01, head_lr=0.01, batch_size=5, eval_every=2
    ),
    "contrastive": ContrastiveStage(n_steps=5, lr=0.02, gate_lr=0.01, batch_size=8, eval_every=2),
    "black box": BlackBoxStage(
        n_queries=42, population_size=4, intrinsic_dim=6, alpha=0.5, eval_every=16
    ),
    "distilled": DistilledStage(
        n_queries=42,
        population_size=4,
        intrinsic_dim=6,
        alpha=0.5,
        eval_every=16,
        min_agreement=0.5,
    ),
    "plain zeroth order": ZerothOrderStage(n_queries=9, lr=0.1, batch_size=5, eval_every=4),
    "conservative": ZerothOrderStage(
        n_queries=17, lr=1.0, rule="conservative", batch_size=5, eval_every=5
    ),
}
KINDS: dict[str, PromptKind] = {
    kind.name: kind
    for kind in (
        SoftPrompt(),
        DeepPrompt(),
        LowRankPrompt(rank=2, hidden=5),
        TwoSidedPrompt(),
        TwoSidedDeepPrompt(),
        TwoSidedLowRankPrompt(rank=2, hidden=5),
    )
}
BY_GRADIENTS = ("gradient", "contrastive")
MODELS: dict[str, Callable[..., TaskModel]] = {
    **TASK_MODELS,
    "causal": causal_lm,
    "masked": masked_lm,
}
ROWS = [
    row
    for row in product(METHODS, KINDS, TASK_MODELS)
    # A prompt of two sides is dear, and one method of each sort tells what there is to tell.
    if (
        not row[1].startswith("two-sided")
        or (row[2] == "dual" and row[0] in ("gradient", "black box"))
    )
    and (row[0] in BY_GRADIENTS or not KINDS[row[1]].needs_gradient)
    and (row[0] != "contrastive" or row[2] == "sequence")
] + [
    ("gradient", "deep", "causal"),
    ("gradient", "lowrank", "causal"),
    ("black box", "soft", "causal"),
    ("distilled", "soft", "causal"),
    ("conservative", "soft", "causal"),
    ("gradient", "soft", "masked"),
    ("black box", "deep", "masked"),
    ("distilled", "soft", "masked"),
    ("plain zeroth order", "soft", "masked"),
]


def each_of(rows: Sequence[tuple[str, str, str]]) -> pytest.MarkDecorator:
    names = ("method", "kind", "model_name")
    return pytest.mark.parametrize(names, rows, ids=["-".join(row) for row in rows])


each_row = each_of(ROWS)


class Ground:
    """A model with its splits and a restart prompt of a kind."""

    def __init__(self, kind: str, model_name: str) -> None:
        self.model: TaskModel = MODELS[model_name]()
        self.train: Split = self.model.encode(make_examples(18, seed=1))
        self.validation: Split = self.model.encode(make_examples(12, seed=2))
        self.token_ids = make_space().from_text("people write this").token_ids
        self.start: Prompt = self.model.start([self.token_ids], self.train, KINDS[kind])
        if KINDS[kind].needs_gradient:  # Encodings are counted where they are first asked for.
            for split in (self.train, self.validation):
                evaluate(self.model, self.start, split)

    def run(
        self, stage: Stage, *, seed: int = 0, stop_after: int | None = None
    ) -> tuple[StageResult, list[Evaluation], Passes]:
        """What a stage comes to, what its observer sees, and its passes."""
        seen: list[Evaluation] = []

        def observe(evaluation: Evaluation) -> bool:
            seen.append(evaluation)
            return len(seen) == stop_after

        run = Run(self.model, self.start, self.train, self.validation, seed, observe)
        with self.model.metered() as passes:
            result = stage.run(run)
        return result, seen, passes


@cache
def whole_run(
    method: str, kind: str, model_name: str
) -> tuple[Ground, StageResult, list[Evaluation], Passes]:
    """A stage of seed 0 to its end, which several laws look at."""
    ground = Ground(kind, model_name)
    return ground, *ground.run(METHODS[method])


@each_row
def test_the_same_seed_gives_the_same_stage(method: str, kind: str, model_name: str) -> None:
    """Bit for bit, with another stage in between."""
    _, one, seen_of_one, passes_of_one = whole_run(method, kind, model_name)
    ground, stage = Ground(kind, model_name), METHODS[method]
    ground.run(stage.with_budget(14), seed=5)
    two, seen_of_two, passes_of_two = ground.run(stage)
    assert_bit_identical(seen_of_one, seen_of_two)
    assert_bit_identical([one.best], [two.best])
    assert (one.spent, passes_of_one) == (two.spent, passes_of_two)


@each_row
def test_another_seed_is_another_stage(method: str, kind: str, model_name: str) -> None:
    ground, _, one, _ = whole_run(method, kind, model_name)
    _, two, _ = ground.run(METHODS[method], seed=1)
    assert_bit_identical(one[:1], two[:1])
    assert moved(one[-1].prompt, two[-1].prompt)


@each_row
def test_the_model_and_the_start_stay_as_they_are(method: str, kind: str, model_name: str) -> None:
    ground = Ground(kind, model_name)
    encoder = ground.model.encoder  # type: ignore[attr-defined]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    start = ground.start.map(lambda tensor: tensor.clone())
    _, seen, _ = ground.run(METHODS[method])
    assert all(torch.equal(tensor, weights[n]) for n, tensor in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    assert_same_prompt(ground.start, start)
    tensors = [tensor for e in seen for tensor in e.prompt.tensors.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@each_row
def test_the_best_is_the_best_that_was_seen(method: str, kind: str, model_name: str) -> None:
    """So it is never worse than the start, which is seen first."""
    ground, result, seen, _ = whole_run(method, kind, model_name)
    assert seen[0].step == 0
    assert_same_prompt(seen[0].prompt, ground.start)
    assert result.best.loss == min(evaluation.loss for evaluation in seen)
    steps = [evaluation.step for evaluation in seen]
    assert steps == sorted(set(steps)) and steps[-1] == result.spent
    for evaluation in seen:
        found = evaluate(ground.model, evaluation.prompt, ground.validation)
        assert (found.loss, found.accuracy) == ((evaluation.loss,), (evaluation.accuracy,))


@each_row
def test_a_stage_spends_no_more_than_its_budget(method: str, kind: str, model_name: str) -> None:
    ground, stage = Ground(kind, model_name), METHODS[method]
    for budget in (0, 5, 11):
        result, seen, _ = ground.run(stage.with_budget(budget))
        assert result.spent <= budget
        assert stage.with_budget(budget).budget == budget
        n_tensors = len(ground.start.trained)
        assert result.spent == SPENT[method](budget, n_tensors)


SPENT: dict[str, Callable[[int, int], int]] = {
    "gradient": lambda budget, n_tensors: budget,
    "contrastive": lambda budget, n_tensors: budget,
    "black box": lambda budget, n_tensors: 1 + (budget - 1) // 4 * 4 if budget else 0,
    "distilled": lambda budget, n_tensors: 1 + (budget - 1) // 4 * 4 if budget else 0,
    "plain zeroth order": lambda budget, n_tensors: budget // 2 * 2,
    "conservative": lambda budget, n_tensors: budget // 5 * 5,
}


@each_row
def test_a_stage_stops_where_its_observer_says(method: str, kind: str, model_name: str) -> None:
    """Until there it is the same."""
    ground, _, all_seen, _ = whole_run(method, kind, model_name)
    stopped, seen, _ = ground.run(METHODS[method], stop_after=2)
    assert stopped.stopped and stopped.spent == seen[-1].step < all_seen[-1].step
    assert_bit_identical(seen, all_seen[:2])


# The contrastive loss is another than that of the labels: test_contrastive.py lowers it.
@each_of([row for row in ROWS if row[0] != "contrastive"])
def test_training_lowers_the_training_loss(method: str, kind: str, model_name: str) -> None:
    ground = Ground(kind, model_name)
    ground.validation = ground.train
    result, seen, _ = ground.run(METHODS[method])
    assert result.best.loss < seen[0].loss


@each_row
def test_a_head_is_trained_with_gradients_only(method: str, kind: str, model_name: str) -> None:
    ground, _, seen, passes = whole_run(method, kind, model_name)
    needs_gradient = method in BY_GRADIENTS
    for name, tensor in seen[-1].prompt.head.items():
        assert torch.equal(tensor, ground.start.head[name]) == (not needs_gradient)
    assert (passes.backward > 0) == needs_gradient
    assert passes.forward > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name not in BY_GRADIENTS])
@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_no_gradient_is_asked_of_a_black_box(
    method: str, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model raises if somebody asks for one, which a gradient stage does."""
    ground = Ground("soft", model_name)
    log_probs = ground.model.log_probs

    def black(prompt: Prompt, batch: Split) -> Tensor:
        needs = any(tensor.requires_grad for tensor in prompt.tensors.values())
        if needs and torch.is_grad_enabled():
            raise RuntimeError("a black box has no gradient to give")
        return log_probs(prompt, batch)

    monkeypatch.setattr(ground.model, "log_probs", black)
    ground.run(METHODS[method])
    with pytest.raises(RuntimeError, match="no gradient to give"):
        ground.run(METHODS["gradient"])


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_an_untrained_deep_prompt_is_the_soft_prompt_of_its_words(model_name: str) -> None:
    for one, two in (("soft", "deep"), ("two-sided", "two-sided-deep")):
        if model_name != "dual" and one == "two-sided":
            continue
        soft, deep = Ground(one, model_name), Ground(two, model_name)
        assert len(deep.start.trained) == 2 * len(soft.start.trained)
        torch.testing.assert_close(
            deep.model.log_probs(deep.start, deep.train),
            soft.model.log_probs(soft.start, soft.train),
        )
        assert torch.equal(deep.start.words(), soft.start.words())


def test_tensors_are_in_the_order_of_their_layers() -> None:
    """A file gives them by name, in which the tenth layer comes before the second."""
    names = ["texts.10", "texts", "head.weight", "texts.2", "labels.1", "labels"]
    prompt = Prompt(DeepPrompt(), {name: torch.zeros(1, 2, 3) for name in names})
    assert list(prompt.trained) == ["labels", "labels.1", "texts", "texts.2", "texts.10"]


def test_hidden_states_may_be_wider_than_embeddings() -> None:
    encoder, tokenizer = make("Electra", COMMON | {"embedding_size": 16}), bert()
    model = SequenceClassifier(Pretrained.of(encoder, tokenizer), LABELS, max_virtual_tokens=4)
    train = model.encode(make_examples(9, seed=1))
    start = model.start([[7, 9]], train, DeepPrompt())
    shapes = {name: tuple(tensor.shape) for name, tensor in start.trained.items()}
    assert shapes == {"texts": (1, 2, 16), "texts.1": (1, 2, 32)}
    result = GradientStage(n_steps=2, eval_every=1, lr=0.1).run(Run(model, start, train, train))
    assert result.best.step > 0


def moved(one: Prompt, two: Prompt) -> bool:
    return any(not torch.equal(t, two.tensors[name]) for name, t in one.trained.items())
