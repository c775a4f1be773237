"""Law: every pass through a frozen model is counted, by the thread that makes it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
import math
import pickle
import sys
from threading import Barrier

import pytest
from torch import nn

from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import losses
from optuna_llm_catalyst.prompt_tuning.models import Passes
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .tiny import any_head
from .tiny import hard
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_examples
from .tiny import make_pretrained
from .tiny import make_sequence


N_LABELS = len(LABELS)


def encoded(model: TaskModel, n: int) -> Split:
    return model.encode(make_examples(n, seed=7))


def prompts(model: TaskModel, n: int = 1) -> Prompt:
    texts = ("wolf new bread", "thing just over", "call the our")[:n]
    return hard(model, *texts).with_head(any_head(model, n))


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_pass_counts_the_sequences_of_all_its_prompts(n_prompts: int) -> None:
    for model, n_sequences in ((make_dual(), N_LABELS), (make_sequence(), 5)):
        split = encoded(model, 5)
        with model.metered() as passes:
            evaluate(model, prompts(model, n_prompts), split)
        assert passes == Passes(forward=1, backward=0, sequences=n_prompts * n_sequences)


def test_a_backward_pass_counts_one_a_forward_pass() -> None:
    model = make_sequence()
    split = encoded(model, 70)  # Two passes of up to 64 sequences.
    prompt = prompts(model).map(lambda tensor: tensor.requires_grad_())
    with model.metered() as passes:
        loss = losses(model.log_probs(prompt, split), split.labels).sum()
        assert passes == Passes(forward=2, backward=0, sequences=70)
        loss.backward()
    assert passes == Passes(forward=2, backward=2, sequences=70)


def test_dual_encoder_reads_texts_once_in_batches() -> None:
    model = make_dual()
    with model.metered() as passes:
        split = encoded(model, 300)
    assert passes == Passes(forward=math.ceil(300 / 128), backward=0, sequences=300)
    assert len(split) == 300


def test_cost_of_a_stage_of_a_dual_encoder() -> None:
    """A pass a step, and a pass an evaluation."""
    model = make_dual()
    run = Run(model, prompts(model), encoded(model, 9), encoded(model, 7))
    with model.metered() as passes:
        GradientStage(n_steps=5, eval_every=2).run(run)
    n_passes = 5 + 4  # Evaluations at the steps 0, 2, 4, 5.
    assert passes == Passes(forward=n_passes, backward=5, sequences=N_LABELS * n_passes)


def test_cost_of_a_stage_of_a_sequence_classifier() -> None:
    """Its fresh head, its batches and its evaluations."""
    model = make_sequence()
    train, validation = encoded(model, 70), encoded(model, 7)
    with model.metered() as passes:
        start = model.start([(5, 6, 7)], train)
        GradientStage(n_steps=7, eval_every=7, batch_size=20).run(
            Run(model, start, train, validation)
        )
    # The fit takes 64 + 6 examples; an epoch of 20 + 20 + 20 + 10, twice but for one batch.
    assert passes.forward == 2 + 7 + 2
    assert passes.backward == 7
    assert 70 + (140 - 20) + 14 <= passes.sequences <= 70 + (140 - 10) + 14


def test_nothing_is_counted_outside_of_the_block() -> None:
    model = make_dual()
    split = encoded(model, 3)
    with model.metered() as passes:
        pass
    evaluate(model, prompts(model), split)
    with pytest.raises(RuntimeError), model.metered() as broken:
        raise RuntimeError
    evaluate(model, prompts(model), split)
    assert passes == broken == Passes()


def test_blocks_can_be_nested() -> None:
    model = make_dual()
    split = encoded(model, 3)
    with model.metered() as outer:
        evaluate(model, prompts(model), split)
        with model.metered() as inner:
            evaluate(model, prompts(model), split)
        evaluate(model, prompts(model), split)
    assert (outer.forward, inner.forward) == (3, 1)


def test_another_models_passes_are_not_counted() -> None:
    one, other = make_dual(), make_dual()
    with one.metered() as passes:
        evaluate(other, prompts(other), encoded(other, 3))
    assert passes == Passes()


def share(pretrained: Pretrained, n: int) -> list[TaskModel]:
    """Task models on one encoder."""
    models: list[TaskModel] = [DualEncoderClassifier(pretrained, LABELS) for _ in range(n)]
    return [*models, SequenceClassifier(pretrained, LABELS, max_virtual_tokens=8)]


@pytest.mark.parametrize("n_models", [0, 1, 4])
def test_an_encoder_has_one_meter_for_good(n_models: int) -> None:
    pretrained = make_pretrained()
    models = share(pretrained, n_models)
    for model in models:
        with model.metered():
            assert len(pretrained.encoder._forward_hooks) == 1
    assert len(pretrained.encoder._forward_hooks) == 1
    with models[0].metered() as passes:
        evaluate(models[-1], prompts(models[-1]), encoded(models[-1], 3))
    assert passes.forward == 1  # Whoever makes the pass.


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": deepcopy,
    "pickle": lambda encoder: pickle.loads(pickle.dumps(encoder)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_a_copied_encoder_keeps_one_meter_of_its_own(
    copy: Callable[[nn.Module], nn.Module],
) -> None:
    model = make_dual()
    encoder = copy(model.encoder)
    again = DualEncoderClassifier(
        Pretrained.of(encoder, make_pretrained().tokenizer, name="bert"), LABELS
    )
    assert len(encoder._forward_hooks) == 1
    split = encoded(again, 3)
    with again.metered() as passes, model.metered() as passes_of_the_first:
        evaluate(again, prompts(again), split)
    assert (passes.forward, passes_of_the_first.forward) == (1, 0)


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    """Threads that take turns at nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
def test_threads_on_one_encoder_count_their_own_passes() -> None:
    """Blocks that overlap, of models that share an encoder, are one trial's each."""
    models = share(make_pretrained(), 3)
    splits = [encoded(model, 3) for model in models]
    barrier = Barrier(len(models))

    def work(thread: int) -> list[Passes]:
        model, split = models[thread], splits[thread]
        prompt = prompts(model).map(lambda tensor: tensor.clone().requires_grad_())
        counts = []
        barrier.wait()
        for _ in range(15):
            with model.metered() as passes:
                for _ in range(thread + 1):
                    evaluate(model, prompt, split)
                losses(model.log_probs(prompt, split), split.labels).sum().backward()
            counts.append(passes)
        return counts

    with ThreadPoolExecutor(len(models)) as pool:
        counts = list(pool.map(work, range(len(models))))
    for thread, of_thread in enumerate(counts):
        n_passes = thread + 2
        assert of_thread == [Passes(n_passes, 1, n_passes * 3)] * 15  # 3 labels, 3 texts.
