"""Search without gradients against its definition, and a model that is a function or a server."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import json
import logging
import math
import subprocess
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial
from optuna.trial import TrialState
import pytest
import torch
import torch.nn.functional as F

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import load_trajectory
from optuna_llm_catalyst import ModelError
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.prompt_tuning import BlackBoxModel
from optuna_llm_catalyst.prompt_tuning import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import DistilledStage
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import GradientStage
from optuna_llm_catalyst.prompt_tuning import over_http
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import ZerothOrderStage
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.stages import Run
from optuna_llm_catalyst.prompt_tuning.stages import Stage
from optuna_llm_catalyst.prompt_tuning.stages import StageResult
from optuna_llm_catalyst.prompt_tuning.stages.black_box import Subspace
from optuna_llm_catalyst.prompt_tuning.stages.distilled import _Student
from tests.conftest import logged

from .tiny import make_examples
from .tiny import make_space
from .tiny import make_task
from .tiny import TASK_MODELS


WIDTH = 6
TABLE = np.random.default_rng(0).normal(0, 0.5, (70, WIDTH)).astype(np.float32)
TARGET = np.random.default_rng(1).normal(0, 0.5, (3, WIDTH)).astype(np.float32)
EXAMPLES = [Example(f"text {i}", i % 2) for i in range(8)]


def bowl(rows: NDArray[np.float32], examples: Sequence[Example]) -> NDArray[np.float64]:
    """The true label's probability falls with the distance from a target prompt, (P, B, 2)."""
    distances = ((rows[:, :3] - TARGET[: rows.shape[1]]) ** 2).sum((1, 2))  # (P,)
    right = np.broadcast_to(np.exp(-0.05 - distances)[:, None], (len(rows), len(examples)))
    labels = np.array([example.label for example in examples])
    found = np.stack([1 - right, right], -1)
    found[:, labels == 0] = found[:, labels == 0, ::-1]
    return np.log(np.maximum(found, 1e-300))


def black_box(**options: object) -> BlackBoxModel:
    return BlackBoxModel(bowl, TABLE, ["no", "yes"], name="bowl", **options)  # type: ignore[arg-type]


def run_on(model: TaskModel, stage: Stage, seed: int = 0) -> tuple[StageResult, list[float]]:
    """The result of a stage from the words 5, 6, 7, and the losses that it saw."""
    split = model.encode(EXAMPLES)
    start = model.start([[5, 6, 7]], split)
    seen: list[float] = []
    run = Run(model, start, split, split, seed, lambda e: bool(seen.append(e.loss)))
    return stage.run(run), seen


def loss_of(prompt: Prompt) -> float:
    return float(-bowl(prompt.words().numpy(), EXAMPLES)[0, np.arange(8), np.arange(8) % 2].mean())


# The search.


def test_a_planted_minimum_is_found() -> None:
    """Of 18 numbers, to a hundredth of the loss above the minimum."""
    stage = BlackBoxStage(n_queries=4000, population_size=20, intrinsic_dim=60)
    result, seen = run_on(black_box(), stage)
    assert result.best.loss - 0.05 < 0.01 * (seen[0] - 0.05)


@pytest.mark.parametrize("rule", ["plain", "conservative"])
def test_estimated_gradients_lead_downhill(rule: str) -> None:
    stage = ZerothOrderStage(n_queries=1000, lr=0.1, epsilon=0.01, rule=rule)  # type: ignore[arg-type]
    result, seen = run_on(black_box(), stage)
    assert result.best.loss - 0.05 < 0.05 * (seen[0] - 0.05)


def test_the_projection_has_the_spread_of_its_definition() -> None:
    """``alpha * spread / sqrt(k)``, so that a first step has entries of ``alpha * spread``."""
    prompt = Prompt(SoftPrompt(), {"texts": torch.zeros(1, 20, 30)})
    subspace = Subspace.random(prompt, "texts", 50, 0.4 * 0.25, np.random.default_rng(0))
    assert subspace.projection.shape == (600, 50)
    assert subspace.projection.std().item() == pytest.approx(0.1 / math.sqrt(50), rel=0.02)
    z = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0))
    assert subspace.prompts(prompt, z).words().std().item() == pytest.approx(0.1, rel=0.03)


def test_the_trained_prompt_lies_in_the_random_subspace() -> None:
    """Two directions for eighteen numbers."""
    stage = BlackBoxStage(n_queries=101, population_size=5, intrinsic_dim=2)
    moves = []
    for n_queries in (21, 51, 101):
        result, _ = run_on(black_box(), stage.with_budget(n_queries))
        moves.append((result.best.prompt.words() - torch.from_numpy(TABLE[[5, 6, 7]])).flatten())
    assert np.linalg.matrix_rank(torch.stack(moves).numpy(), tol=1e-4) == 2


def test_the_training_loss_never_rises_from_layer_to_layer() -> None:
    """The layers take turns, and each goes on from the best that is known."""
    model = TASK_MODELS["sequence"]()
    train = model.encode(make_examples(18, seed=1))
    ids = make_space().from_text("people write this").token_ids
    run = Run(model, model.start([ids], train, DeepPrompt()), train, train)
    changed: list[set[str]] = []
    found: list[float] = []
    before: list[Prompt] = [run.start]

    def observe(evaluation: object) -> bool:
        prompt, loss = evaluation.prompt, evaluation.loss  # type: ignore[attr-defined]
        found.append(loss)
        own = prompt.trained.items()
        changed.append({n for n, t in own if not torch.equal(t, before[-1].tensors[n])})
        before.append(prompt)
        return False

    stage = BlackBoxStage(
        n_queries=81, population_size=4, intrinsic_dim=10, alpha=0.2, eval_every=1
    )
    stage.run(Run(run.model, run.start, train, train, 0, observe))
    assert found == sorted(found, reverse=True) and found[-1] < found[0]
    assert len(found) == 21  # The start, and twenty populations of four.
    assert set().union(*changed) == {"texts", "texts.1"}


@pytest.mark.parametrize("model_name", TASK_MODELS)
def test_a_population_is_one_batched_call(
    model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TASK_MODELS[model_name]()
    train = model.encode(make_examples(6, seed=1))
    validation = model.encode(make_examples(5, seed=2))
    start = model.start([make_space().from_text("people").token_ids], train)
    calls: list[tuple[int, int]] = []
    log_probs = model.log_probs

    def spy(prompt: Prompt, batch: object) -> torch.Tensor:
        calls.append((len(prompt), len(batch)))  # type: ignore[arg-type]
        return log_probs(prompt, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "log_probs", spy)
    stage = BlackBoxStage(n_queries=25, population_size=8, intrinsic_dim=4, eval_every=99)
    stage.run(Run(model, start, train, validation))
    assert calls == [(1, 5), (1, 6), (8, 6), (8, 6), (8, 6), (1, 5)]


# The student.


def distilled(**options: Any) -> DistilledStage:
    return DistilledStage(n_queries=301, population_size=10, intrinsic_dim=40, **options)


def test_without_weight_the_student_changes_nothing() -> None:
    """Bit for bit."""
    plain = BlackBoxStage(n_queries=61, population_size=10, intrinsic_dim=40)
    (one, seen_of_one), (two, seen_of_two) = (
        run_on(black_box(), stage, seed=4)
        for stage in (plain, distilled(gd_weight=0.0).with_budget(61))
    )
    assert seen_of_one == seen_of_two
    assert torch.equal(one.best.prompt.words(), two.best.prompt.words())
    weighty = distilled(gd_weight=0.5, min_agreement=0.0).with_budget(61)
    _, other = run_on(black_box(), weighty, seed=4)
    assert other != seen_of_one


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_student_leads_downhill(weight: float) -> None:
    result, seen = run_on(black_box(), distilled(gd_weight=weight, min_agreement=0.0))
    assert result.best.loss < seen[0] - 1


def test_a_student_learns_what_the_black_box_says() -> None:
    """Of a linear black box, on points that it has not seen."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(5, 12))

    def answers(points: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(points @ weights).float().view(-1, 4, 3).log_softmax(-1)

    student = _Student(5, 4, 3)
    unseen = generator.normal(size=(50, 5))
    before = student.agreement(unseen, answers(unseen))
    for _ in range(20):
        points = generator.normal(size=(10, 5))
        student.learn(points, answers(points))
    after = student.agreement(unseen, answers(unseen))
    assert after > 0.85 > before
    labels = torch.tensor([0, 1, 2, 0])
    path = student.descent(np.zeros(5), labels, 10)
    losses = [F.nll_loss(answers(point[None])[0], labels).item() for point in path]
    assert losses[-1] < losses[0] - 0.1


def test_a_student_starts_the_same_whatever_else_is_drawn() -> None:
    """Stages may run in threads, which share PyTorch's own generator."""
    state = torch.random.get_rng_state()
    one = _Student(5, 4, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    for name, weights in _Student(5, 4, 3).state_dict().items():
        assert torch.equal(weights, one.state_dict()[name])


def test_a_student_learns_of_probabilities_of_zero() -> None:
    """A function that underflows says -inf; nothing that is learnt from it is NaN."""

    def sure(rows: NDArray[np.float32], examples: Sequence[Example]) -> NDArray[np.float64]:
        found = bowl(rows, examples)
        return np.where(found > np.log(0.5), 0.0, -np.inf)

    model = BlackBoxModel(sure, TABLE, ["no", "yes"], name="sure")
    split = model.encode(EXAMPLES)
    assert model.log_probs(model.start([[5, 6, 7]], split), split).isfinite().all()
    stage = distilled(gd_weight=1.0, min_agreement=0.0).with_budget(31)
    result, seen = run_on(model, stage)
    assert np.isfinite([*seen, result.best.loss]).all()


def test_a_student_that_does_not_agree_is_left_out_and_the_log_says_so() -> None:
    """Once a stage. The only agreement that counts is with prompts that it has not seen."""
    # A student cannot agree on what is no label: the black box changes its mind at every query.
    generator = np.random.default_rng(0)

    def noise(rows: NDArray[np.float32], examples: Sequence[Example]) -> NDArray[np.float64]:
        found = np.log([0.1, 0.9])[generator.integers(2, size=(len(rows), len(examples)))]
        return np.stack([found, np.log1p(-np.exp(found))], -1)

    model = BlackBoxModel(noise, TABLE, ["no", "yes"], name="noise")
    with logged("optuna", logging.INFO) as lines:
        run_on(model, distilled(min_agreement=0.9))
    [line] = lines
    assert "The student agrees with the black box on " in line and "fewer than 90%" in line


# A model that is a function.


def test_a_black_box_gives_what_its_function_gives() -> None:
    model = black_box()
    split = model.encode(EXAMPLES)
    prompt = model.start([[5, 6, 7], [1, 2, 3], [9, 9, 9]], split)
    assert torch.equal(prompt.words(), torch.from_numpy(TABLE[[[5, 6, 7], [1, 2, 3], [9, 9, 9]]]))
    whole = model.log_probs(prompt, split)
    expected = torch.from_numpy(bowl(prompt.words().numpy(), EXAMPLES)).float()
    torch.testing.assert_close(whole, expected)
    for batch_size in (1, 2, 5, 100):
        small = black_box(batch_size=batch_size)
        with small.metered() as passes:
            torch.testing.assert_close(small.log_probs(prompt, split), expected)
        assert passes.sequences == 24 and passes.backward == 0
        assert passes.forward == {1: 24, 2: 16, 5: 8, 100: 1}[batch_size]


def test_a_black_box_raises_if_a_gradient_is_asked_for() -> None:
    model = black_box()
    split = model.encode(EXAMPLES)
    prompt = model.start([[5, 6, 7]], split).map(lambda tensor: tensor.requires_grad_())
    with pytest.raises(RuntimeError, match="bowl is a black box: it has no gradient to give"):
        model.log_probs(prompt, split)
    with torch.no_grad():
        model.log_probs(prompt, split)


def failing(rows: object, examples: object) -> NDArray[np.float64]:
    raise OSError("out of order\nat 3 o'clock")


FAULTS = {
    "fails": (failing, "bowl gave no log-probabilities: out of order$"),
    "no numbers": (lambda rows, examples: "none", "bowl gave no log-probabilities"),
    "a label less": (lambda rows, examples: np.zeros((1, 8, 1)), r"shape \(1, 8, 1\), expected"),
    "a prompt less": (lambda rows, examples: np.zeros((0, 8, 2)), r"shape \(0, 8, 2\), expected"),
    "probabilities": (lambda rows, examples: np.full((1, 8, 2), 0.5), "do not sum to 1"),
    "not a number": (lambda rows, examples: np.full((1, 8, 2), np.nan), "do not sum to 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none_is_an_error(fault: str) -> None:
    function, message = FAULTS[fault]
    model = BlackBoxModel(function, TABLE, ["no", "yes"], name="bowl")  # type: ignore[arg-type]
    split = model.encode(EXAMPLES)
    with pytest.raises(ModelError, match=message):
        model.log_probs(model.start([[1, 2]], split), split)


BAD = {
    "no vectors": (lambda: BlackBoxModel(bowl, [], ["a", "b"], name="x"), "`embeddings`"),
    "a vector": (lambda: BlackBoxModel(bowl, TABLE[0], ["a", "b"], name="x"), r"shape \(6,\)"),
    "not finite": (lambda: BlackBoxModel(bowl, TABLE * np.nan, ["a"], name="x"), "finite"),
    "no name": (lambda: BlackBoxModel(bowl, TABLE, ["a", "b"], name=""), "`name`"),
    "no batch": (lambda: black_box(batch_size=0), "`batch_size` must be at least 1"),
    "another tokenizer": (lambda: black_box().embed([[70]]), "there are 70 embeddings only"),
    "few queries": (lambda: BlackBoxStage(n_queries=20), "`n_queries` must be 0 or at least 21"),
    "fewer than none": (lambda: BlackBoxStage(n_queries=-1), "`n_queries` must be 0 or at least"),
    "fewer estimates": (lambda: ZerothOrderStage(n_queries=-1), "`n_queries` must be at least 0"),
    "few prompts": (lambda: BlackBoxStage(population_size=3), "`population_size`.*at least 4"),
    "one dimension": (lambda: BlackBoxStage(intrinsic_dim=1), "`intrinsic_dim`.*at least 2"),
    "no step": (lambda: BlackBoxStage(alpha=0), "`alpha` must be positive, got 0"),
    "no number": (lambda: BlackBoxStage(alpha=math.nan), "`alpha` must be positive, got nan"),
    "much weight": (lambda: DistilledStage(gd_weight=1.5), "`gd_weight` must be at most 1"),
    "no agreement": (
        lambda: DistilledStage(min_agreement=-1),
        "`min_agreement` must be at least 0",
    ),
    "no rate": (lambda: ZerothOrderStage(lr=0), "`lr` must be positive, got 0"),
    "no distance": (lambda: ZerothOrderStage(epsilon=-1), "`epsilon` must be positive, got -1"),
    "a rule": (lambda: ZerothOrderStage(rule="x"), "`rule` must be 'plain' or"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


# In a study.

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
import numpy as np
table, classes = np.load(sys.argv[1]), np.load(sys.argv[2])
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = np.array(asked["embeddings"]).mean(1)  # (P, d)
        texts = np.stack([table[[sum(map(ord, w)) % len(table) for w in t.split()]].mean(0)
                          for t in asked["texts"]])  # (B, d)
        logits = 4 * np.tanh(2 * prompts[:, None] + texts) @ classes.T  # (P, B, C)
        logits -= logits.max(-1, keepdims=True)
        found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        body = json.dumps({"log_probs": found.tolist()}).encode()
        if self.path == "/broken": body = b"{"
        self.send_response(500 if self.path == "/error" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model behind a server in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    generator = np.random.default_rng(0)
    np.save(folder / "table.npy", generator.normal(size=(50, WIDTH)))
    np.save(folder / "classes.npy", generator.normal(size=(3, WIDTH)))
    arguments = [str(folder / "table.npy"), str(folder / "classes.npy")]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


def behind(url: str) -> BlackBoxModel:
    table = np.random.default_rng(2).normal(0, 0.5, (make_space().vocab_size, WIDTH))
    return BlackBoxModel(over_http(url), table, make_task().labels, name="server")


def replies(n: int) -> ReplayProvider:
    words = ("number", "people", "water", "first", "place", "good", "thing", "back")
    return ReplayProvider(
        [json.dumps({"prompts": [f"the {a} {b}" for b in words[:2]]}) for a in words[:n]]
    )


@pytest.mark.parametrize(
    "stage",
    [
        BlackBoxStage(n_queries=41, population_size=4, intrinsic_dim=6, eval_every=20),
        ZerothOrderStage(n_queries=40, lr=0.3, eval_every=20),
    ],
    ids=["bbt", "zo"],
)
def test_an_llm_restarts_stages_on_a_model_behind_a_server(
    url: str, stage: Stage, sqlite: Callable[[], RDBStorage], store: FileSystemArtifactStore
) -> None:
    """The study is cut in two, and goes on in another storage connection as if it was not."""

    def objective() -> PromptTuningObjective:
        return PromptTuningObjective(
            behind(url), make_task(), make_space(), stage=stage, artifact_store=store
        )

    def sampler(of: PromptTuningObjective) -> LLMCatalystSampler:
        return LLMCatalystSampler(
            of.space, llm=replies(4), task_description="Sort.", screen=of.score, seed=0
        )

    cut = optuna.create_study(storage=sqlite(), study_name="cut")
    for _ in range(2):
        one = objective()
        cut = optuna.load_study(storage=sqlite(), study_name="cut", sampler=sampler(one))
        cut.optimize(one, n_trials=2)
    whole = optuna.create_study(sampler=sampler(one))
    whole.optimize(objective(), n_trials=4)
    assert [t.values for t in cut.trials] == [t.values for t in whole.trials]
    assert [t.params for t in cut.trials] == [t.params for t in whole.trials]
    for trial in cut.trials:
        attrs = trial.user_attrs
        assert attrs["origin"] == "llm" and attrs["stage_steps"] == stage.budget
        assert attrs["backward_passes"] == 0 and attrs["forward_passes"] > 0
        assert trial.value <= trial.intermediate_values[0]
        trajectory = load_trajectory(trial)
        assert trajectory is not None and len(trajectory.points) >= 2
        swaps = [swap for point in trajectory.points for swap in point.swaps]
        assert swaps and all(s.predicted is None and s.measured is not None for s in swaps)
    classifier = objective().classifier(cut)
    texts = [example.text for example in make_task().test]
    assert set(classifier.predict(texts)) <= set(make_task().labels)
    np.testing.assert_allclose(classifier.predict_proba(texts).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("path", ["/broken", "/error"])
def test_a_server_that_fails_is_named(url: str, path: str) -> None:
    model = behind(url + path)
    split = model.encode(make_examples(2, seed=0))
    with pytest.raises(ModelError, match=f"{url}{path} gave no log-probabilities: "):
        model.log_probs(model.start([[1, 2]], split), split)


def test_a_server_that_is_not_there_is_named() -> None:
    model = behind("http://127.0.0.1:9/")
    split = model.encode(make_examples(2, seed=0))
    with pytest.raises(ModelError, match="http://127.0.0.1:9/ gave no log-probabilities: "):
        model.log_probs(model.start([[1, 2]], split), split)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gradients": ({"stage": GradientStage()}, "BlackBoxModel has none to give: take"),
    "no stage": ({}, "BlackBoxModel has none to give: take"),
    "a deep prompt": (
        {"stage": BlackBoxStage(), "prompt_kind": DeepPrompt()},
        "A deep prompt needs an encoder whose layers",
    ),
    "a text prompt": (
        {"stage": BlackBoxStage(), "n_text_prompts": 1},
        "takes prompts before its texts only",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_black_box_cannot_do_is_refused_at_construction(case: str) -> None:
    options, message = REFUSED[case]
    model = BlackBoxModel(
        bowl, np.ones((make_space().vocab_size, 2)), make_task().labels, name="x"
    )
    with pytest.raises(ValueError, match=message):
        PromptTuningObjective(model, make_task(), make_space(), **options)


def test_a_black_box_takes_stages_that_a_trial_makes(store: FileSystemArtifactStore) -> None:
    """Also with a budget that the trial suggests; and a stage with gradients is refused there."""
    table = np.random.default_rng(2).normal(0, 0.5, (make_space().vocab_size, WIDTH))

    def flat(rows: NDArray[np.float32], examples: Sequence[Example]) -> NDArray[np.float64]:
        return np.full((len(rows), len(examples), 3), np.log(1 / 3))

    def objective(make: Callable[[BaseTrial], Stage]) -> PromptTuningObjective:
        model = BlackBoxModel(flat, table, make_task().labels, name="flat")
        space = make_space()
        return PromptTuningObjective(
            model, make_task(), space, make_stage=make, artifact_store=store
        )

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        objective(lambda t: ZerothOrderStage(n_queries=t.suggest_int("n", 5, 20), lr=0.1)),
        n_trials=2,
    )
    assert len(study.get_trials(states=[TrialState.COMPLETE])) == 2
    with pytest.raises(ValueError, match="GradientStage needs gradients, and BlackBoxModel"):
        study.optimize(objective(lambda _: GradientStage()), n_trials=1)
