from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning.models import EncodedSplit
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import Head
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import embed
from optuna_llm_catalyst.prompt_tuning.stages import bucketed_batches
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult

from .tiny import make_examples
from .tiny import make_space
from .tiny import TASK_MODELS


STAGES: dict[str, GradientStage] = {
    "adamw": GradientStage(n_steps=7, lr=0.02, head_lr=0.01, batch_size=5, eval_every=3),
    "sgd": GradientStage(
        n_steps=7, lr=0.5, head_lr=0.1, batch_size=5, eval_every=3, optimizer="sgd"
    ),
}
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)


class Ground:
    """A model with its splits and a restart prompt."""

    def __init__(self, model_name: str, *, text: str = "people write this") -> None:
        self.model: TaskModel = TASK_MODELS[model_name]()
        self.train: EncodedSplit = self.model.encode(make_examples(18, seed=1))
        self.validation: EncodedSplit = self.model.encode(make_examples(12, seed=2))
        prompt = make_space().from_text(text)
        self.start: Tensor = embed([prompt.token_ids], self.model.word_embeddings)[0]

    def run(
        self, stage: Stage, *, stop_at: int | None = None, **options: Any
    ) -> tuple[StageResult, list[Evaluation]]:
        """The result of a stage, and what its observer saw."""
        seen: list[Evaluation] = []

        def observe(evaluation: Evaluation) -> bool:
            seen.append(evaluation)
            return evaluation.index == stop_at

        result = stage.run(
            self.model, self.start, self.train, self.validation, observe=observe, **options
        )
        return result, seen


def assert_bit_identical(one: Sequence[Evaluation], two: Sequence[Evaluation]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.index, a.step, a.loss, a.accuracy) == (b.index, b.step, b.loss, b.accuracy)
        assert torch.equal(a.prompt, b.prompt)
        assert a.head.keys() == b.head.keys()
        assert all(torch.equal(a.head[name], b.head[name]) for name in a.head)


# Laws of a stage.


@each_stage
@each_model
def test_the_same_seed_gives_the_same_stage_bit_for_bit(model_name: str, stage: Stage) -> None:
    results = [Ground(model_name).run(stage, seed=3) for _ in range(2)]
    (one, seen_of_one), (two, seen_of_two) = results
    assert_bit_identical(seen_of_one, seen_of_two)
    assert_bit_identical([one.best], [two.best])
    assert one.n_steps == two.n_steps


@each_stage
@each_model
def test_another_seed_takes_batches_smaller_than_the_data_in_another_order(
    model_name: str, stage: Stage
) -> None:
    ground = Ground(model_name)
    (_, one), (_, two) = ground.run(stage, seed=0), ground.run(stage, seed=1)
    assert_bit_identical(one[:1], two[:1])
    assert not torch.equal(one[-1].prompt, two[-1].prompt)


@each_stage
@each_model
def test_a_stage_in_between_changes_nothing(model_name: str, stage: GradientStage) -> None:
    ground = Ground(model_name)
    _, before = ground.run(stage)
    ground.run(replace(stage, lr=stage.lr * 7, n_steps=3), seed=5)
    _, after = ground.run(stage)
    assert_bit_identical(before, after)


@each_stage
@each_model
def test_a_stage_does_not_touch_the_prompt_and_the_head_it_starts_from(
    model_name: str, stage: Stage
) -> None:
    ground = Ground(model_name)
    head = ground.model.fresh_head(ground.start[None], ground.train)
    start = ground.start.clone()
    copies = {name: rows.clone() for name, rows in head.items()}
    ground.run(stage, head=head)
    assert torch.equal(ground.start, start)
    assert all(torch.equal(head[name], copies[name]) for name in head)


@each_model
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0, 100.0])
def test_the_best_is_the_lowest_loss_seen_and_never_worse_than_the_start(
    model_name: str, lr: float
) -> None:
    ground = Ground(model_name)
    result, seen = ground.run(GradientStage(n_steps=9, lr=lr, head_lr=lr, eval_every=2))
    assert result.best.loss == min(evaluation.loss for evaluation in seen)
    assert result.best.loss <= seen[0].loss
    assert_bit_identical([result.best], [seen[result.best.index]])


@each_model
def test_an_evaluation_says_what_its_prompt_and_head_are_worth(model_name: str) -> None:
    ground = Ground(model_name)
    _, seen = ground.run(STAGES["adamw"])
    for evaluation in seen:
        metrics = evaluate(
            ground.model, evaluation.prompt[None], evaluation.head, ground.validation
        )
        assert metrics.loss == (evaluation.loss,)
        assert metrics.accuracy == (evaluation.accuracy,)


@each_model
def test_training_lowers_the_loss_that_it_trains_on(model_name: str) -> None:
    ground = Ground(model_name)
    ground.validation = ground.train
    result, seen = ground.run(GradientStage(n_steps=30, lr=0.01, eval_every=30))
    assert result.best.step == 30
    assert result.best.loss < seen[0].loss - 0.05


# When it looks, and when it ends.


@pytest.mark.parametrize(
    ("n_steps", "eval_every", "steps"),
    [
        (0, 10, [0]),
        (1, 10, [0, 1]),
        (6, 3, [0, 3, 6]),
        (7, 3, [0, 3, 6, 7]),
        (4, 1, [0, 1, 2, 3, 4]),
        (3, 5, [0, 3]),
    ],
)
@each_model
def test_the_start_the_end_and_every_so_many_steps_are_evaluated(
    model_name: str, n_steps: int, eval_every: int, steps: list[int]
) -> None:
    stage = GradientStage(n_steps=n_steps, eval_every=eval_every)
    result, seen = Ground(model_name).run(stage)
    assert [evaluation.step for evaluation in seen] == steps
    assert [evaluation.index for evaluation in seen] == list(range(len(steps)))
    assert (result.n_steps, result.stopped) == (n_steps, False)


@each_model
def test_a_stage_of_no_steps_evaluates_the_restart_prompt(model_name: str) -> None:
    ground = Ground(model_name)
    result, seen = ground.run(GradientStage(n_steps=0))
    assert torch.equal(result.best.prompt, ground.start)
    assert_bit_identical([result.best], seen)
    fresh = ground.model.fresh_head(ground.start[None], ground.train)
    assert all(torch.equal(result.best.head[name], fresh[name]) for name in fresh)


@each_stage
def test_a_stage_stops_where_its_observer_says_and_is_the_same_until_there(stage: Stage) -> None:
    ground = Ground("dual")
    stopped, seen = ground.run(stage, stop_at=1)
    _, all_seen = ground.run(stage)
    assert (stopped.n_steps, stopped.stopped) == (3, True)
    assert_bit_identical(seen, all_seen[:2])
    assert stopped.best.loss == min(evaluation.loss for evaluation in seen)


def test_a_stage_can_be_stopped_before_its_first_step() -> None:
    result, seen = Ground("dual").run(STAGES["adamw"], stop_at=0)
    assert (result.n_steps, result.stopped, len(seen)) == (0, True, 1)


def test_a_stage_needs_no_observer() -> None:
    ground = Ground("dual")
    result = STAGES["adamw"].run(ground.model, ground.start, ground.train, ground.validation)
    assert_bit_identical([result.best], [ground.run(STAGES["adamw"])[0].best])


@each_model
def test_a_stage_that_diverges_ends_there_and_keeps_the_finite_best(model_name: str) -> None:
    ground = Ground(model_name)
    stage = GradientStage(n_steps=50, lr=3e38, optimizer="sgd", eval_every=2)
    result, seen = ground.run(stage)
    assert not math.isfinite(seen[-1].loss)
    assert result.n_steps == seen[-1].step < 50
    assert not result.stopped
    assert result.best.step == 0
    assert torch.equal(result.best.prompt, ground.start)
    assert math.isfinite(result.best.loss)


@each_model
def test_a_stage_goes_on_with_a_given_head(model_name: str) -> None:
    ground = Ground(model_name)
    result, _ = ground.run(STAGES["adamw"])
    ground.start = result.best.prompt
    again, seen = ground.run(STAGES["adamw"], head=result.best.head)
    assert seen[0].loss == result.best.loss
    assert again.best.loss <= result.best.loss


# The optimisers, against loops written by hand.

Update = Callable[[GradientStage, float, Tensor, Tensor, dict[str, Tensor], int], Tensor]


def sgd_by_hand(
    stage: GradientStage, lr: float, x: Tensor, g: Tensor, memory: dict[str, Tensor], t: int
) -> Tensor:
    memory["velocity"] = 0.9 * memory.get("velocity", torch.zeros_like(g)) + g
    return x - lr * memory["velocity"]


def adamw_by_hand(
    stage: GradientStage, lr: float, x: Tensor, g: Tensor, memory: dict[str, Tensor], t: int
) -> Tensor:
    memory["m"] = 0.9 * memory.get("m", torch.zeros_like(g)) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", torch.zeros_like(g)) + 0.001 * g * g
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return x - lr * m / (v.sqrt() + 1e-8)


UPDATES: dict[str, Update] = {"sgd": sgd_by_hand, "adamw": adamw_by_hand}


HAND_WRITTEN = STAGES | {"decayed_adamw": replace(STAGES["adamw"], weight_decay=0.3)}


@pytest.mark.parametrize("stage", HAND_WRITTEN.values(), ids=HAND_WRITTEN.keys())
@each_model
def test_a_stage_is_the_loop_written_by_hand(model_name: str, stage: GradientStage) -> None:
    ground = Ground(model_name)
    _, seen = ground.run(stage, seed=4)
    prompt = ground.start
    head: Head = ground.model.fresh_head(prompt[None], ground.train)
    memories: dict[str, dict[str, Tensor]] = {name: {} for name in ("prompt", *head)}
    batches = bucketed_batches(ground.train.lengths, 5, seed=4)
    update = UPDATES[stage.optimizer]
    for t in range(1, stage.n_steps + 1):
        leaves = {"prompt": prompt, **head}
        leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        batch = ground.train.select(next(batches))
        trained_head = {name: leaves[name] for name in head}
        logits = ground.model.logits(leaves["prompt"][None], trained_head, batch)
        losses(logits, batch.labels).sum().backward()
        with torch.no_grad():
            for name, x in leaves.items():
                lr = stage.lr if name == "prompt" else stage.head_lr
                decay = stage.weight_decay if name == "prompt" else 0.0
                assert x.grad is not None
                x.copy_(update(stage, lr, x * (1 - lr * decay), x.grad, memories[name], t))
        prompt, head = leaves["prompt"].detach(), {name: leaves[name].detach() for name in head}
    torch.testing.assert_close(seen[-1].prompt, prompt, rtol=1e-3, atol=1e-4)
    for name, rows in head.items():
        torch.testing.assert_close(seen[-1].head[name], rows, rtol=1e-3, atol=1e-4)
    assert (seen[-1].prompt - ground.start).abs().max() > 0.01


@each_model
def test_a_stage_takes_the_models_batch_size_unless_it_has_its_own(model_name: str) -> None:
    ground = Ground(model_name)
    size = ground.model.batch_size
    own, models_own = (GradientStage(n_steps=3, batch_size=n, lr=0.01) for n in (size, None))
    (_, one), (_, two) = ground.run(own), ground.run(models_own)
    assert_bit_identical(one, two)
    smaller = replace(own, batch_size=4)
    assert not torch.equal(ground.run(smaller)[1][-1].prompt, one[-1].prompt)


# Batches.

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 12), st.integers(0, 2**31))
def test_every_epoch_has_every_example_once(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    n_batches = math.ceil(len(lengths) / batch_size)
    batches = bucketed_batches(lengths, batch_size, seed)
    for _ in range(3):
        epoch = list(islice(batches, n_batches))
        assert sorted(i for batch in epoch for i in batch) == list(range(len(lengths)))
        assert max(map(len, epoch)) <= batch_size


@given(LENGTHS, st.integers(1, 12), st.integers(0, 2**31))
def test_batches_have_like_lengths(lengths: list[int], batch_size: int, seed: int) -> None:
    n_batches = math.ceil(len(lengths) / batch_size)
    epoch = list(islice(bucketed_batches(lengths, batch_size, seed), n_batches))
    ranges = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in epoch)
    # No two batches overlap but at their ends: no other cut of the data is padded less.
    assert all(one[1] <= two[0] for one, two in zip(ranges, ranges[1:], strict=False))


@given(LENGTHS, st.integers(1, 12), st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_batches(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    one, two = (islice(bucketed_batches(lengths, batch_size, seed), 20) for _ in range(2))
    assert list(one) == list(two)


def test_examples_of_one_length_meet_others_each_epoch() -> None:
    batches = bucketed_batches([3] * 12, 4, seed=0)
    epochs = [{frozenset(batch) for batch in islice(batches, 3)} for _ in range(5)]
    assert len({frozenset(epoch) for epoch in epochs}) == 5


def test_the_order_of_batches_changes_from_epoch_to_epoch() -> None:
    batches = bucketed_batches(range(1, 25), 2, seed=0)
    epochs = [tuple(map(tuple, islice(batches, 12))) for _ in range(5)]
    assert len(set(epochs)) == 5
    assert len({frozenset(epoch) for epoch in epochs}) == 1


# Bad arguments.

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"n_steps": -1}, "`n_steps` must be at least 0, got -1"),
    ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ({"eval_every": 0}, "`eval_every` must be at least 1, got 0"),
    ({"lr": 0.0}, "`lr` must be positive, got 0.0"),
    ({"lr": -1e-3}, "`lr` must be positive"),
    ({"lr": math.nan}, "`lr` must be positive, got nan"),
    ({"head_lr": math.inf}, "`head_lr` must be positive, got inf"),
    ({"optimizer": "adam"}, "`optimizer` must be 'adamw' or 'sgd', got 'adam'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_refused_by_name_and_value(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GradientStage(**arguments)
