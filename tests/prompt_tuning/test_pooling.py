"""The pooling of a folder, held to what sentence-transformers makes of the same folder."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import re
from typing import Any

import pytest
from safetensors.torch import load_file
import torch
from torch import nn
from torch import Tensor

from optuna_llm_catalyst import ModelNotFoundError
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning.models.tokens import encode_texts
from optuna_llm_catalyst.prompt_tuning.pooling import Pooling
from optuna_llm_catalyst.prompt_tuning.pooling import read_pooling
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained

from .tiny import make_encoder
from .tiny import make_examples


sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

WIDTH = 32
EXAMPLES = make_examples(9, seed=0)
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def dense(**options: Any) -> Callable[[int], nn.Module]:
    return lambda width: modules.Dense(width, 5, **options)


#: The pooling modes, and what follows them.
SAVED: dict[str, tuple[tuple[str, ...], list[Callable[[int], nn.Module]]]] = {
    **{mode: ((mode,), []) for mode in MODES},
    **{f"{mode}, normalized": ((mode,), [lambda _: modules.Normalize()]) for mode in MODES},
    "first and mean": (("cls", "mean"), []),
    "all of them": (MODES, [lambda _: modules.Normalize()]),
    "in another order": (("mean", "cls"), []),
    "dense": (("mean",), [dense()]),
    "dense, normalized": (("cls",), [dense(bias=False), lambda _: modules.Normalize()]),
    "dense without activation": (("mean",), [dense(activation_function=None)]),
    "dense with GELU": (("mean",), [dense(activation_function=nn.GELU())]),
    "two dense": (("mean",), [dense(bias=False), lambda _: modules.Dense(5, 7)]),
    "normalized, dense": (("max",), [lambda _: modules.Normalize(), dense()]),
    "layer norm": (("mean", "max"), [modules.LayerNorm]),
    "dropout": (("mean",), [lambda _: modules.Dropout(0.5)]),
}


def save(folder: Path, modes: tuple[str, ...], layers: list[Callable[[int], nn.Module]]) -> Path:
    """A sentence encoder as sentence-transformers saves it."""
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    parts = [
        modules.Transformer(str(folder / "bare")),
        modules.Pooling(WIDTH, modes),
    ]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts += [make(WIDTH * len(modes)) for make in layers]
    made = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    made.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def features(pretrained: Pretrained) -> Tensor:
    split = encode_texts(pretrained.tokenizer, EXAMPLES, pretrained.encoder, max_length=None)
    tokens = {name: field.rows for name, field in split.fields.items()}
    with torch.no_grad():
        hidden = pretrained.encoder.eval()(**tokens).last_hidden_state
        return pretrained.pooling(hidden, tokens["attention_mask"])


def reference(folder: Path) -> Tensor:
    encoder = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True
    )
    texts = [example.text for example in EXAMPLES]
    found: Tensor = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return found


def assert_same_direction(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    cosines = torch.cosine_similarity(got.double(), expected.double())
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", SAVED)
def test_features_are_those_of_sentence_transformers(case: str, tmp_path: Path) -> None:
    folder = save(tmp_path, *SAVED[case])
    assert_same_direction(features(load_pretrained(str(folder))), reference(folder))


def with_flags(folder: Path, modes: tuple[str, ...]) -> None:
    flags = {
        "cls": "cls_token",
        "max": "max_tokens",
        "mean": "mean_tokens",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "weightedmean": "weightedmean_tokens",
        "lasttoken": "lasttoken",
    }
    config: dict[str, Any] = {"word_embedding_dimension": WIDTH}
    config |= {f"pooling_mode_{flag}": mode in modes for mode, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("cls", "mean"), ()])
def test_the_flags_of_older_files_mean_the_same(modes: tuple[str, ...], tmp_path: Path) -> None:
    folder = save(tmp_path, ("mean",), [])
    with_flags(folder, modes)
    assert read_pooling(folder).modes == (modes or ("mean",))
    assert_same_direction(features(load_pretrained(str(folder))), reference(folder))


def test_the_types_and_folders_of_the_first_versions_are_known(tmp_path: Path) -> None:
    folder = save(tmp_path, ("cls",), [dense()])
    expected = reference(folder)
    (folder / "0_Transformer").mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "modules.json":
            path.rename(folder / "0_Transformer" / path.name)
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), folder / "2_Dense" / "pytorch_model.bin")
    weights.unlink()
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.models.{path[2:]}",
        }
        for i, path in enumerate(("0_Transformer", "1_Pooling", "2_Dense"))
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    assert_same_direction(features(load_pretrained(str(folder))), expected)


@pytest.mark.parametrize(
    ("architecture", "mode"), [("Qwen3ForCausalLM", "lasttoken"), ("BertForMaskedLM", "mean")]
)
def test_a_folder_without_modules_is_pooled_by_its_kind(
    architecture: str, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert read_pooling(tmp_path).modes == (mode,)


def entry(path: str, kind: str) -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": kind}


ST = "sentence_transformers.models."
FIRST = [entry("", f"{ST}Transformer"), entry("1_Pooling", f"{ST}Pooling")]
#: What a folder's files say, and what the message must say.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": ({"modules.json": "{oops"}, r"modules\.json cannot be read as JSON"),
    "nested too deeply": ({"modules.json": "[" * 200_000}, r"modules\.json cannot be read"),
    "no list": ({"modules.json": {"a": 1}}, r'"modules" must be a list'),
    "no type": ({"modules.json": [{"path": ""}]}, r'"modules\[0\]\.type" is missing'),
    "no pooling": ({"modules.json": FIRST[:1]}, "must begin with a Transformer and a Pooling"),
    "words": (
        {"modules.json": [entry("", f"{ST}WordEmbeddings"), FIRST[1]]},
        r"models\.WordEmbeddings, .*must begin with a Transformer",
    ),
    "an unknown module": (
        {"modules.json": [*FIRST, entry("2_CNN", f"{ST}CNN")]},
        r"sentence_transformers\.models\.CNN, which cannot be run here",
    ),
    "somebody's module": (
        {"modules.json": [*FIRST, entry("", "mine.Normalize")]},
        r"lists mine\.Normalize, which cannot",
    ),
    "a folder outside": (
        {"modules.json": [FIRST[0], entry("../1_Pooling", f"{ST}Pooling")]},
        r"'\.\./1_Pooling', which is outside the model",
    ),
    "an unknown mode": ({"1_Pooling/config.json": {"pooling_mode": "median"}}, "median is not"),
    "a mode that is a number": (
        {"1_Pooling/config.json": {"pooling_mode": 3}},
        '"pooling_mode" must be',
    ),
    "an activation of somebody's": (
        {
            "modules.json": [*FIRST, entry("2_Dense", f"{ST}Dense")],
            "2_Dense/config.json": {
                "in_features": WIDTH,
                "out_features": 5,
                "activation_function": "os.system",
            },
        },
        r"the activation os\.system, which is none of torch's",
    ),
    "dense on each token": (
        {
            "modules.json": [*FIRST, entry("2_Dense", f"{ST}Dense")],
            "2_Dense/config.json": {"module_input_name": "token_embeddings"},
        },
        "its Dense works on token_embeddings, not on pooled vectors",
    ),
    "dense weights of another shape": (
        {
            "modules.json": [*FIRST, entry("2_Dense", f"{ST}Dense")],
            "2_Dense/config.json": {"in_features": WIDTH, "out_features": 7},
        },
        r"its Linear\(.*out_features=7.* does not match its weights, bias of \(5,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pooling_that_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    folder = save(tmp_path, ("mean",), [dense()])
    files, message = REFUSED[case]
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    with pytest.raises(
        ModelNotFoundError, match=f"{re.escape(str(folder))}.*({message})"
    ) as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_dense_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, ("mean",), [dense()])
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="2_Dense"):
        load_pretrained(str(folder))


def test_the_real_minilm_is_pooled_by_its_mean(minilm: Pretrained) -> None:
    assert minilm.pooling.modes == ("mean",)
    assert len(minilm.pooling.layers) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_what_the_mask_hides_does_not_count(mode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, WIDTH, generator=generator).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    pooling = Pooling((mode,))
    pooled = pooling(hidden, mask)
    assert (pooled.shape, pooled.dtype) == ((2, WIDTH), torch.float32)
    for row, length in enumerate((3, 2)):
        alone = pooling(hidden[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(pooled[row : row + 1], alone)


def test_the_mean_is_bit_for_bit_the_mean() -> None:
    hidden = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    weights = mask.unsqueeze(-1).float()
    expected = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    assert torch.equal(Pooling()(hidden, mask), expected)


def test_gradients_reach_the_hidden_states_and_not_the_layers() -> None:
    layers = nn.Sequential(nn.Linear(WIDTH, 3))
    hidden = torch.randn(2, 4, WIDTH, requires_grad=True)
    Pooling(layers=layers)(hidden, torch.ones(2, 4)).sum().backward()
    assert hidden.grad is not None
    assert layers[0].weight.grad is None


@pytest.mark.parametrize("modes", [(), ("median",), ("mean", "median")])
def test_an_unknown_mode_is_refused(modes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="is not known: use cls, max, mean"):
        Pooling(modes)
