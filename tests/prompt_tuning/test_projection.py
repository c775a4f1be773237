from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import TrajectoryPoint
from optuna_llm_catalyst.prompt_tuning import DualEncoderClassifier
from optuna_llm_catalyst.prompt_tuning import nearest
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import word_table
from optuna_llm_catalyst.prompt_tuning.models import evaluate
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling
from optuna_llm_catalyst.prompt_tuning.projection import Distance
from optuna_llm_catalyst.prompt_tuning.projection import drift
from optuna_llm_catalyst.prompt_tuning.projection import Projector
from optuna_llm_catalyst.prompt_tuning.projection import promising_swaps
from optuna_llm_catalyst.prompt_tuning.projection import WordTable
from optuna_llm_catalyst.prompt_tuning.split import Split
from optuna_llm_catalyst.prompt_tuning.stages import Evaluation
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .tiny import ENCODERS
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_encoder
from .tiny import make_examples
from .tiny import make_space
from .tiny import soft
from .tiny import TASK_MODELS


each_distance = pytest.mark.parametrize("distance", get_args(Distance))
each_model = pytest.mark.parametrize("model_name", TASK_MODELS)
seeds = st.integers(0, 2**32)


def tiny_table(encoder: str = "bert") -> WordTable:
    _, tokenizer = make_encoder(encoder)
    return word_table(PromptSpace(tokenizer, 3), make_dual(encoder).embed)


def random_table(n_words: int, width: int, seed: int) -> WordTable:
    embeddings = torch.randn(n_words, width, generator=torch.Generator().manual_seed(seed))
    return WordTable(tuple(range(n_words)), tuple(f"w{i}" for i in range(n_words)), embeddings)


def real_table(minilm: Pretrained) -> WordTable:
    space = PromptSpace(minilm.tokenizer, 8)
    return word_table(space, DualEncoderClassifier(minilm, LABELS).embed)


# Law 8: nearest token is nearest.


@each_distance
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_word_is_nearest_to_itself(encoder: str, distance: Distance) -> None:
    table = tiny_table(encoder)
    assert nearest(table.embeddings, table, distance) == list(range(len(table.words)))


@each_distance
def test_words_of_minilm_are_nearest_to_themselves(minilm: Pretrained, distance: Distance) -> None:
    """Every eighth word, among all of them."""
    table = real_table(minilm)
    assert len(table.words) > 15_000
    rows = list(range(0, len(table.words), 8))
    assert nearest(table.embeddings[rows], table, distance) == rows


@each_distance
@given(seed=seeds)
def test_a_noisy_word_is_nearest_to_itself(distance: Distance, seed: int) -> None:
    table = tiny_table()
    noise = torch.randn(table.embeddings.shape, generator=torch.Generator().manual_seed(seed))
    noise *= 0.05 * table.embeddings.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    assert nearest(table.embeddings + noise, table, distance) == list(range(len(table.words)))


@each_distance
@given(seed=seeds, n_words=st.integers(1, 20), width=st.integers(2, 8))
def test_nearest_is_what_a_search_finds(
    distance: Distance, seed: int, n_words: int, width: int
) -> None:
    table = random_table(n_words, width, seed)
    prompt = random_table(5, width, seed + 1).embeddings
    for token, row in zip(prompt.double(), nearest(prompt, table, distance), strict=True):
        words = table.embeddings.double()
        if distance == "cosine":
            distances = [-torch.cosine_similarity(token, word, dim=0) for word in words]
        else:
            distances = [(token - word).norm() for word in words]
        assert distances[row] <= min(distances) + 1e-5


def test_the_two_distances_can_differ() -> None:
    table = WordTable((0, 1), ("far", "near"), torch.tensor([[10.0, 0.0], [0.7, 0.7]]))
    prompt = torch.tensor([[1.0, 0.1]])
    assert nearest(prompt, table, "cosine") == [0]
    assert nearest(prompt, table, "l2") == [1]


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="'cosine' or 'l2', got 'dot'"):
        nearest(torch.zeros(1, 32), tiny_table(), "dot")


def test_a_table_holds_whole_words_and_embeddings() -> None:
    encoder, tokenizer = make_encoder()
    space = PromptSpace(tokenizer, 3)
    table = word_table(space, make_dual().embed)
    weight = encoder.get_input_embeddings().weight
    assert dict(zip(table.token_ids, table.words, strict=True)) == space.whole_words
    assert torch.equal(table.embeddings, weight[list(table.token_ids)])
    assert "wolf" in table.words
    assert not {"##s", "[CLS]", "a"} & set(table.words)


def test_a_table_takes_any_token_it_must_name() -> None:
    embed = make_dual().embed
    space = make_space()
    tokenizer = space.tokenizer
    plain = word_table(space, embed)
    wolf, piece, cls = (tokenizer.convert_tokens_to_ids(t) for t in ("wolf", "##ing", "[CLS]"))
    table = word_table(space, embed, also=(wolf, piece, cls, piece))
    assert table.token_ids == (*plain.token_ids, piece, cls)
    for distance in get_args(Distance):
        rows = nearest(embed([[piece, wolf, cls]])[0], table, distance)
        assert [table.token_ids[row] for row in rows] == [piece, wolf, cls]


# Drift.


def slow_drift(prompt: Tensor, start: Tensor, table: WordTable) -> list[list[float]]:
    """Cosines by position and word, one by one; -2 for the word that the start is."""
    found = []
    for token, origin in zip(prompt.double(), start.double(), strict=True):
        row = []
        for word in table.embeddings.double():
            there = word - origin
            is_start = there.norm() < 1e-3 * origin.norm()
            row.append(
                -2.0 if is_start else float(torch.cosine_similarity(token - origin, there, dim=0))
            )
        found.append(row)
    return found


@given(
    seed=seeds,
    n_words=st.integers(2, 40),
    width=st.sampled_from([2, 8, 64]),
    size=st.sampled_from([0.002, 0.05, 1.0]),
)
def test_drift_is_what_a_search_finds(seed: int, n_words: int, width: int, size: float) -> None:
    table = random_table(n_words, width, seed)
    start = table.embeddings[[0, 1, 0]]
    step = random_table(3, width, seed + 1).embeddings
    prompt = start + size * step * start.norm(dim=-1, keepdim=True) / step.norm(
        dim=-1, keepdim=True
    )
    cosines = slow_drift(prompt, start, table)
    found = drift(prompt, start, table)
    assert sorted(position for position, _, _ in found) == [0, 1, 2]
    for position, row, cosine in found:
        assert cosine == pytest.approx(max(cosines[position]), abs=2e-3)
        assert cosines[position][row] == pytest.approx(cosine, abs=2e-3)
    fits = [cosine for _, _, cosine in found]
    assert fits == sorted(fits, reverse=True)


@pytest.mark.parametrize("part", [0.01, 0.3, 1.0])
def test_moving_towards_a_word_names_it(part: float) -> None:
    table = tiny_table()
    for row in range(3, len(table.words)):
        start = table.embeddings[[0, 1, 2]]
        prompt = start.clone()
        prompt[1] += part * (table.embeddings[row] - start[1])
        assert drift(prompt, start, table) == [(1, row, pytest.approx(1, abs=1e-3))]


def test_moving_towards_a_word_of_minilm_names_it(minilm: Pretrained) -> None:
    table = real_table(minilm)
    rows = torch.randperm(len(table.words), generator=torch.Generator().manual_seed(0))[:16]
    start, goal = table.embeddings[rows[:8]], table.embeddings[rows[8:]]
    found = drift(start + 0.05 * (goal - start), start, table)
    fits = pytest.approx(1, abs=1e-3)
    assert sorted(found) == [(i, row, fits) for i, row in enumerate(rows[8:].tolist())]


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_tokens_that_hardly_moved_have_no_drift(size: float) -> None:
    table = tiny_table()
    start = table.embeddings[:3]
    moved = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    moved *= size * start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    assert drift(start + moved, start, table) == []


def test_the_only_word_is_no_direction() -> None:
    table = random_table(1, 4, seed=0)
    assert drift(table.embeddings + 0.1, table.embeddings, table) == []


# Swaps, to first order.


@given(
    seed=seeds,
    n_words=st.integers(1, 30),
    length=st.integers(1, 5),
    n=st.integers(0, 12),
)
def test_promising_swaps_are_what_a_search_finds(
    seed: int, n_words: int, length: int, n: int
) -> None:
    """The lowest first-order changes, at most two a position."""
    table = random_table(n_words, 6, seed)
    hard = table.embeddings[torch.arange(length) % n_words]
    gradient = random_table(length, 6, seed + 1).embeddings
    every = []
    for position in range(length):
        changes = [
            (float((word - hard[position]) @ gradient[position]), row)
            for row, word in enumerate(table.embeddings)
        ]
        every += [(c, position, row) for c, row in sorted(changes)[:2] if c < -1e-5]
    expected = sorted(every)[:n]
    found = [swap for swap in promising_swaps(hard, gradient, table, n) if swap[2] < -1e-5]
    assert [(position, row) for position, row, _ in found] == [(p, r) for _, p, r in expected]
    changes = [change for *_, change in found]
    assert changes == pytest.approx([c for c, *_ in expected], abs=1e-4)


def test_no_swap_is_promised_where_the_loss_is_flat() -> None:
    table = tiny_table()
    assert promising_swaps(table.embeddings[:3], torch.zeros(3, 32), table, 8) == []


# Points.


class PreciseMean(Pooling):
    """The mean of the hidden states in float64."""

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).double()
        return (hidden.double() * weights).sum(1) / weights.sum(1)


class PreciseSequence(SequenceClassifier):
    """Its heads are in float64."""

    def fresh_head(self, prompt: Prompt, train: Split) -> Prompt:
        head = super().fresh_head(prompt, train).head
        return prompt.with_head({name: rows.double() for name, rows in head.items()})


def make_precise(model_name: str) -> TaskModel:
    """A task model that computes in float64: its loss is smooth enough for finite differences."""
    encoder, tokenizer = make_encoder()
    pretrained = Pretrained.of(encoder.double(), tokenizer, pooling=PreciseMean())
    if model_name == "dual":
        return DualEncoderClassifier(pretrained, LABELS)
    return PreciseSequence(pretrained, LABELS, max_virtual_tokens=8)


class Scene:
    """A projector with what it needs, at the words "people write this"."""

    def __init__(self, model: TaskModel, **options: Any) -> None:
        self.model = model
        self.space = make_space()
        self.table = word_table(self.space, model.embed)
        self.train = model.encode(make_examples(20, seed=1))
        self.validation = model.encode(make_examples(12, seed=2))
        self.start = self.words("people write this")
        self.run = Run(model, self.start, self.train, self.validation)
        options = {"n_checked_swaps": 4} | options
        self.projector = Projector(self.run, self.table, **options)

    def words(self, text: str) -> Prompt:
        """The prompt that starts at these words, with a fresh head."""
        return self.model.start([self.space.from_text(text).token_ids], self.train)

    def loss(self, prompt: Prompt) -> float:
        return evaluate(self.model, prompt, self.validation).loss[0]

    def evaluation(self, prompt: Prompt, *, step: int = 0) -> Evaluation:
        return self.run.evaluate(prompt, step)

    def point(self, prompt: Prompt, *, step: int = 0) -> TrajectoryPoint:
        return self.projector.point(self.evaluation(prompt, step=step))

    def moved(self, position: int, word: str, *, part: float = 1.0) -> Prompt:
        """The start with its own head, and one virtual token moved towards a word."""
        embeddings = self.start.words().clone()  # (1, L, d)
        goal = self.table.embeddings[self.table.words.index(word)].to(embeddings.dtype)
        embeddings[0, position] += part * (goal - embeddings[0, position])
        return soft(self.model, embeddings, self.start.head)


@each_model
def test_the_start_is_its_own_words(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name]())
    evaluation = scene.evaluation(scene.start)
    point = scene.projector.point(evaluation)
    assert point.text == "people write this"
    assert point.token_ids == scene.space.from_text("people write this").token_ids
    assert (point.step, point.loss, point.accuracy) == (0, evaluation.loss, evaluation.accuracy)
    assert point.hard_loss == pytest.approx(evaluation.loss, abs=1e-5)
    assert point.drift == ()


@each_model
def test_a_far_point_has_words_their_loss_and_drift(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name]())
    point = scene.point(scene.moved(1, "wolf", part=0.9), step=5)
    assert (point.step, point.text) == (5, "people wolf this")
    # The words' own loss, with a head that is fitted to them where there is one. The same words
    # have the same head, bit for bit; the swaps in the same pass may round the loss differently.
    assert point.hard_loss == pytest.approx(scene.loss(scene.words("people wolf this")), abs=1e-5)
    assert point.loss != point.hard_loss
    [word] = point.drift
    assert (word.position, word.word, word.cosine) == (1, "wolf", pytest.approx(1, abs=1e-3))


@each_model
def test_a_swap_is_measured_as_it_would_be_alone(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name]())
    point = scene.point(scene.start)
    assert 1 <= len(point.swaps) <= 4
    for swap in point.swaps:
        assert swap.old == point.words[swap.position]
        alone = scene.loss(scene.moved(swap.position, swap.new))
        assert point.hard_loss is not None
        assert swap.measured == pytest.approx(alone - point.hard_loss, abs=1e-5)
    measured = [swap.measured for swap in point.swaps]
    assert measured == sorted(measured)


@each_model
def test_a_prediction_is_a_slope_of_the_training_loss(model_name: str) -> None:
    """The slope from the hard prompt towards the swap's word, by central differences."""
    scene = Scene(make_precise(model_name))

    def training_loss(prompt: Prompt) -> float:
        log_probs = scene.model.log_probs(prompt, scene.train)[0]  # (B, C)
        assert log_probs.dtype == torch.float64
        return float(torch.nn.functional.nll_loss(log_probs, scene.train.labels))

    swaps = scene.point(scene.start).swaps
    assert swaps
    scene.start = scene.start.map(Tensor.double)
    for swap in swaps:
        ahead, behind = (
            training_loss(scene.moved(swap.position, swap.new, part=part))
            for part in (1e-4, -1e-4)
        )
        assert swap.predicted < 0
        assert swap.predicted == pytest.approx((ahead - behind) / 2e-4, rel=1e-4)


@each_model
def test_the_swaps_of_the_lowest_slope_are_measured(model_name: str) -> None:
    few, many = (Scene(TASK_MODELS[model_name](), n_checked_swaps=n) for n in (2, 6))
    predicted = sorted(swap.predicted for swap in many.point(many.start).swaps)
    assert len(predicted) > 2
    found = sorted(swap.predicted for swap in few.point(few.start).swaps)
    assert found == pytest.approx(predicted[:2], rel=1e-5)


@each_model
def test_a_projection_is_measured_when_its_words_change(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name]())
    nudged = soft(scene.model, scene.start.words() + 1e-3, scene.start.head)
    near = [scene.start, nudged, scene.moved(0, "wolf", part=0.1)]
    evaluations = [scene.evaluation(prompt, step=i) for i, prompt in enumerate(near)]
    other = scene.evaluation(scene.moved(0, "wolf"), step=3)
    with scene.model.metered() as first:
        points = [scene.projector.point(evaluations[0])]
    with scene.model.metered() as again:
        points += [scene.projector.point(evaluation) for evaluation in evaluations[1:]]
    with scene.model.metered() as moved:
        changed = scene.projector.point(other)
    assert first.forward > 0
    assert again.forward == again.backward == 0
    assert (moved.forward, moved.backward) == (first.forward, first.backward)
    assert len({(p.words, p.hard_loss, p.swaps) for p in points}) == 1
    assert [p.step for p in points] == [0, 1, 2]
    assert changed.words == ("wolf", "write", "this")


@each_model
def test_without_swaps_a_projection_needs_no_gradient(model_name: str) -> None:
    """A fit of the head, where there is one, and an evaluation are all that it costs."""
    scene = Scene(TASK_MODELS[model_name](), n_checked_swaps=0)
    evaluation = scene.evaluation(scene.start)
    with scene.model.metered() as passes:
        point = scene.projector.point(evaluation)
    assert point.swaps == ()
    assert (passes.forward, passes.backward) == ({"dual": 1, "sequence": 2}[model_name], 0)


def make_black_box(model_name: str) -> Any:
    """A task model that gives log-probabilities, and fails where a gradient is wanted."""
    model: Any = TASK_MODELS[model_name]()
    log_probs = model.log_probs

    def without_gradient(prompt: Prompt, batch: Split) -> Tensor:
        assert not torch.is_grad_enabled(), "a black box was asked for a gradient"
        return log_probs(prompt, batch)

    model.log_probs, model.is_differentiable = without_gradient, False
    return model


@each_model
def test_a_black_box_gives_no_gradient(model_name: str) -> None:
    scene = Scene(make_black_box(model_name))
    with scene.model.metered() as passes:
        point = scene.point(scene.start)
    assert passes.backward == 0
    assert point.swaps == ()  # Nothing has drifted yet.
    plain = Scene(TASK_MODELS[model_name](), n_checked_swaps=0)
    assert point == plain.point(plain.start)


WITHOUT_GRADIENT: dict[str, Callable[[str], Scene]] = {
    "a black box": lambda model_name: Scene(make_black_box(model_name)),
    "a stage that uses none": lambda name: Scene(TASK_MODELS[name](), by_gradient=False),
}


@each_model
@pytest.mark.parametrize("why", WITHOUT_GRADIENT)
def test_without_gradients_the_words_of_the_drift_are_tried(model_name: str, why: str) -> None:
    scene = WITHOUT_GRADIENT[why](model_name)
    with scene.model.metered() as passes:
        point = scene.point(scene.moved(1, "wolf", part=0.1), step=1)
    assert point.text == "people write this"
    [swap] = point.swaps
    assert (swap.position, swap.old, swap.new, swap.predicted) == (1, "write", "wolf", None)
    # As in training, the head is that of the words that stand there.
    alone = scene.loss(scene.moved(1, "wolf"))
    assert point.hard_loss is not None
    assert swap.measured == pytest.approx(alone - point.hard_loss, abs=1e-5)
    assert passes.backward == 0


@each_model
def test_a_drift_is_measured_when_its_words_change(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name](), by_gradient=False)
    parts = [("wolf", 0.1), ("wolf", 0.2), ("bread", 0.1)]
    evaluations = [
        scene.evaluation(scene.moved(1, word, part=part), step=i)
        for i, (word, part) in enumerate(parts)
    ]
    spent = []
    for evaluation in evaluations:
        with scene.model.metered() as passes:
            [swap] = scene.projector.point(evaluation).swaps
        spent.append(passes.forward)
        assert swap.new == parts[evaluation.step][0]
    assert spent[0] > 0 and spent == [spent[0], 0, spent[0]]


@each_model
@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_strongest_drifts_are_measured_first(model_name: str, n: int) -> None:
    scene = Scene(TASK_MODELS[model_name](), by_gradient=False, n_checked_swaps=n)
    embeddings = scene.start.words().clone()
    embeddings[0] += 0.05 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    point = scene.point(soft(scene.model, embeddings, scene.start.head), step=1)
    assert len(point.drift) == 3
    assert {(s.position, s.new) for s in point.swaps} == {
        (d.position, d.word) for d in point.drift[:n]
    }


@each_model
def test_a_word_that_already_stands_there_is_not_tried(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name](), by_gradient=False)
    point = scene.point(scene.moved(1, "wolf", part=0.9), step=1)
    assert [word.word for word in point.drift] == ["wolf"] and point.words[1] == "wolf"
    assert point.swaps == ()


@each_model
def test_a_prompt_of_nans_has_a_point(model_name: str) -> None:
    scene = Scene(TASK_MODELS[model_name]())
    prompt = scene.start.map(lambda tensor: torch.full_like(tensor, torch.nan))
    point = scene.projector.point(Evaluation(1, prompt, torch.nan, 0.0, torch.nan))
    assert len(point.words) == 3
    assert point.drift == ()
