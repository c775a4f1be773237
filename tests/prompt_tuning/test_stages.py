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
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning.metrics import LOSS
from optuna_llm_catalyst.prompt_tuning.metrics import Metric
from optuna_llm_catalyst.prompt_tuning.metrics import METRICS
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import HEAD_PREFIX
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import bucketed_batches
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run
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

    def __init__(
        self, model_name: str, *, text: str = "people write this", metric: Metric = LOSS
    ) -> None:
        self.model: TaskModel = TASK_MODELS[model_name]()
        self.train: Split = self.model.encode(make_examples(18, seed=1))
        self.validation: Split = self.model.encode(make_examples(12, seed=2))
        token_ids = make_space().from_text(text).token_ids
        self.start: Prompt = self.model.start([token_ids], self.train)
        self.metric = metric

    def run(
        self, stage: Stage, *, seed: int = 0, stop_at: int | None = None
    ) -> tuple[StageResult, list[Evaluation]]:
        """The result of a stage, and what its observer saw until the step it stops at."""
        seen: list[Evaluation] = []

        def observe(evaluation: Evaluation) -> bool:
            seen.append(evaluation)
            return evaluation.step == stop_at

        run = Run(self.model, self.start, self.train, self.validation, seed, observe, self.metric)
        return stage.run(run), seen


def assert_same_prompt(one: Prompt, two: Prompt) -> None:
    assert one.kind == two.kind
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def assert_bit_identical(one: Sequence[Evaluation], two: Sequence[Evaluation]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.step, a.loss, a.accuracy) == (b.step, b.loss, b.accuracy)
        assert_same_prompt(a.prompt, b.prompt)


# Laws of a stage.


@each_stage
@each_model
def test_the_same_seed_gives_the_same_stage(model_name: str, stage: Stage) -> None:
    """Bit for bit."""
    results = [Ground(model_name).run(stage, seed=3) for _ in range(2)]
    (one, seen_of_one), (two, seen_of_two) = results
    assert_bit_identical(seen_of_one, seen_of_two)
    assert_bit_identical([one.best], [two.best])
    assert one.spent == two.spent


@each_stage
@each_model
def test_another_seed_takes_batches_in_another_order(model_name: str, stage: Stage) -> None:
    """Where batches are smaller than the data."""
    ground = Ground(model_name)
    (_, one), (_, two) = ground.run(stage, seed=0), ground.run(stage, seed=1)
    assert_bit_identical(one[:1], two[:1])
    assert not torch.equal(one[-1].prompt.words(), two[-1].prompt.words())


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
def test_a_stage_does_not_touch_its_start(model_name: str, stage: Stage) -> None:
    ground = Ground(model_name)
    copy = ground.start.map(lambda tensor: tensor.clone())
    ground.run(stage)
    assert_same_prompt(ground.start, copy)
    assert not any(tensor.requires_grad for tensor in ground.start.tensors.values())


@each_stage
@each_model
def test_later_steps_change_no_earlier_evaluation(model_name: str, stage: Stage) -> None:
    ground = Ground(model_name)
    copies: list[Prompt] = []
    seen: list[Prompt] = []

    def observe(evaluation: Evaluation) -> bool:
        seen.append(evaluation.prompt)
        copies.append(evaluation.prompt.map(lambda tensor: tensor.clone()))
        return False

    stage.run(Run(ground.model, ground.start, ground.train, ground.validation, observe=observe))
    for one, two in zip(seen, copies, strict=True):
        assert_same_prompt(one, two)
        assert not any(tensor.requires_grad for tensor in one.tensors.values())


@each_model
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0, 100.0])
def test_the_best_is_the_lowest_loss_seen(model_name: str, lr: float) -> None:
    """So it is never worse than the start."""
    ground = Ground(model_name)
    result, seen = ground.run(GradientStage(n_steps=9, lr=lr, head_lr=lr, eval_every=2))
    assert result.best.loss == min(evaluation.loss for evaluation in seen)
    assert result.best.loss <= seen[0].loss
    of_best = [evaluation for evaluation in seen if evaluation.step == result.best.step]
    assert_bit_identical([result.best], of_best)


@each_model
def test_an_evaluation_says_what_its_prompt_is_worth(model_name: str) -> None:
    ground = Ground(model_name)
    _, seen = ground.run(STAGES["adamw"])
    for evaluation in seen:
        assert len(evaluation.prompt) == 1
        metrics = evaluate(ground.model, evaluation.prompt, ground.validation)
        assert metrics.loss == (evaluation.loss,)
        assert metrics.accuracy == (evaluation.accuracy,)
        assert evaluation.predictions is not None
        assert torch.equal(metrics.predictions[0], evaluation.predictions)


@each_model
def test_training_lowers_the_loss_that_it_trains_on(model_name: str) -> None:
    ground = Ground(model_name)
    ground.validation = ground.train
    result, seen = ground.run(GradientStage(n_steps=30, lr=0.01, eval_every=30))
    assert result.best.step == 30
    assert result.best.loss < seen[0].loss - 0.05


@each_stage
def test_a_stage_has_a_budget_that_can_be_changed(stage: GradientStage) -> None:
    longer = stage.with_budget(11)
    assert (stage.budget, longer.budget) == (7, 11)
    assert longer == replace(stage, n_steps=11)
    assert longer.with_budget(stage.budget) == stage
    assert Ground("dual").run(longer)[0].spent == 11
    with pytest.raises(ValueError, match="`n_steps` must be at least 0, got -1"):
        stage.with_budget(-1)


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
def test_steps_that_are_evaluated(
    model_name: str, n_steps: int, eval_every: int, steps: list[int]
) -> None:
    stage = GradientStage(n_steps=n_steps, eval_every=eval_every)
    result, seen = Ground(model_name).run(stage)
    assert [evaluation.step for evaluation in seen] == steps
    assert (result.spent, result.stopped) == (n_steps, False)


@each_model
def test_a_stage_of_no_steps_evaluates_the_restart_prompt(model_name: str) -> None:
    ground = Ground(model_name)
    result, seen = ground.run(GradientStage(n_steps=0))
    assert_same_prompt(result.best.prompt, ground.start)
    assert_bit_identical([result.best], seen)


@each_model
@pytest.mark.parametrize("patience", [1, 2, 3, None])
@pytest.mark.parametrize("metric", METRICS)
def test_a_stage_ends_when_its_patience_does(
    metric: str, patience: int | None, model_name: str
) -> None:
    """It is the stage without patience, cut after so many evaluations that are no better."""
    ground = Ground(model_name, metric=METRICS[metric])
    stage = GradientStage(n_steps=12, lr=0.3, head_lr=0.3, eval_every=1)
    _, all_seen = ground.run(stage)
    ranks = [ground.metric.rank(e.value, e.loss) for e in all_seen]
    end, n_worse = 0, 0
    for end in range(1, 13):
        n_worse = 0 if ranks[end] < min(ranks[:end]) else n_worse + 1
        if n_worse == patience:
            break
    result, seen = ground.run(replace(stage, patience=patience))
    assert_bit_identical(seen, all_seen[: end + 1])
    assert (result.spent, result.stopped) == (end, False)
    assert ground.metric.rank(result.best.value, result.best.loss) == min(ranks[: end + 1])


@each_model
def test_a_cosine_schedule_ends_at_a_standstill(model_name: str) -> None:
    """The first step is made at the full rate, the last one hardly moves."""
    ground = Ground(model_name)
    stage = GradientStage(n_steps=8, lr=0.02, eval_every=1, optimizer="sgd")
    (_, constant), (_, cosine) = ground.run(stage), ground.run(replace(stage, schedule="cosine"))
    assert_bit_identical(constant[:2], cosine[:2])
    moved = [
        (b.prompt.words() - a.prompt.words()).norm().item()
        for a, b in zip(cosine, cosine[1:], strict=False)
    ]
    assert 0 < moved[-1] < 0.3 * max(moved)


@each_stage
def test_a_stage_stops_where_its_observer_says(stage: Stage) -> None:
    """Until there it is the same."""
    ground = Ground("dual")
    stopped, seen = ground.run(stage, stop_at=3)
    _, all_seen = ground.run(stage)
    assert (stopped.spent, stopped.stopped) == (3, True)
    assert_bit_identical(seen, all_seen[:2])
    assert stopped.best.loss == min(evaluation.loss for evaluation in seen)


def test_a_stage_can_be_stopped_before_its_first_step() -> None:
    result, seen = Ground("dual").run(STAGES["adamw"], stop_at=0)
    assert (result.spent, result.stopped, len(seen)) == (0, True, 1)


def test_a_stage_needs_no_observer() -> None:
    ground = Ground("dual")
    run = Run(ground.model, ground.start, ground.train, ground.validation)
    result = STAGES["adamw"].run(run)
    assert_bit_identical([result.best], [ground.run(STAGES["adamw"])[0].best])


@each_model
def test_a_stage_that_diverges_keeps_its_finite_best(model_name: str) -> None:
    ground = Ground(model_name)
    stage = GradientStage(n_steps=50, lr=3e38, optimizer="sgd", eval_every=2)
    result, seen = ground.run(stage)
    assert not math.isfinite(seen[-1].loss)
    assert result.spent == seen[-1].step < 50
    assert not result.stopped
    assert result.best.step == 0
    assert_same_prompt(result.best.prompt, ground.start)
    assert math.isfinite(result.best.loss)


@each_model
def test_a_stage_goes_on_from_a_trained_prompt(model_name: str) -> None:
    ground = Ground(model_name)
    result, _ = ground.run(STAGES["adamw"])
    ground.start = result.best.prompt
    again, seen = ground.run(STAGES["adamw"])
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
    memories: dict[str, dict[str, Tensor]] = {name: {} for name in prompt.tensors}
    batches = bucketed_batches(ground.train.lengths, 5, seed=4)
    update = UPDATES[stage.optimizer]
    for t in range(1, stage.n_steps + 1):
        prompt = prompt.map(lambda x: x.detach().clone().requires_grad_())
        batch = ground.train.select(next(batches))
        losses(ground.model.log_probs(prompt, batch), batch.labels).sum().backward()
        with torch.no_grad():
            for name, x in prompt.tensors.items():
                is_head = name.startswith(HEAD_PREFIX)
                lr = stage.head_lr if is_head else stage.lr
                decay = 0.0 if is_head else stage.weight_decay
                assert x.grad is not None
                x.copy_(update(stage, lr, x * (1 - lr * decay), x.grad, memories[name], t))
    trained = seen[-1].prompt
    for name, x in prompt.tensors.items():
        torch.testing.assert_close(trained.tensors[name], x.detach(), rtol=1e-3, atol=1e-4)
    assert (trained.words() - ground.start.words()).abs().max() > 0.01


@each_model
def test_a_stage_takes_the_models_batch_size_unless_it_has_its_own(model_name: str) -> None:
    ground = Ground(model_name)
    size = ground.model.batch_size
    own, models_own = (GradientStage(n_steps=3, batch_size=n, lr=0.01) for n in (size, None))
    (_, one), (_, two) = ground.run(own), ground.run(models_own)
    assert_bit_identical(one, two)
    smaller = replace(own, batch_size=4)
    assert not torch.equal(ground.run(smaller)[1][-1].prompt.words(), one[-1].prompt.words())


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
    ({"lr": 0.0}, "`lr` must be positive and a float32, got 0.0"),
    ({"lr": -1e-3}, "`lr` must be positive and a float32, got -0.001"),
    ({"lr": math.nan}, "`lr` must be positive and a float32, got nan"),
    ({"lr": 1e300}, r"`lr` must be positive and a float32, got 1e\+300"),
    ({"head_lr": 1e39}, r"`head_lr` must be positive and a float32, got 1e\+39"),
    ({"head_lr": math.inf}, "`head_lr` must be positive and a float32, got inf"),
    ({"text_lr": 0.0}, "`text_lr` must be positive and a float32, got 0.0"),
    ({"patience": 0}, "`patience` must be at least 1, got 0"),
    ({"schedule": "linear"}, "`schedule` must be 'constant' or 'cosine', got 'linear'"),
    ({"optimizer": "adam"}, "`optimizer` must be 'adamw' or 'sgd', got 'adam'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientStage(**arguments)
