from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
import copy
from dataclasses import replace
import json
from pathlib import Path
import pickle
import random
import shutil
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.proposers import reply as reply_format
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import transformers as transformers_module
from optuna_llm_catalyst.providers.transformers import _sampling
from optuna_llm_catalyst.providers.transformers import TransformersProvider
from tests.providers import tiny_chat
from tests.providers.tiny_chat import GOOD
from tests.providers.tiny_chat import N_REPLY
from tests.toy_stage import run_python


REQUEST = CompletionRequest("Write a prompt.", reply_format.schema(1), seed=17, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def provider_of(folder: Path, **options: Any) -> TransformersProvider:
    return TransformersProvider(
        str(folder), **({"device": "cpu", "num_ctx": 128, "num_predict": 48} | options)
    )


@pytest.fixture(scope="module")
def provider(folder: Path) -> TransformersProvider:
    return provider_of(folder)


def edit(path: Path, name: str, **fields: Any) -> None:
    """Writes fields into a JSON file of a model; None takes a field away."""
    content = json.loads((path / name).read_text()) | fields
    kept = {key: value for key, value in content.items() if value is not None}
    (path / name).write_text(json.dumps(kept))


def test_completion(folder: Path) -> None:
    provider = provider_of(folder)
    first, second = provider.complete(REQUEST), provider.complete(REQUEST)
    assert (first.text, first.model, first.problem) == (GOOD, str(folder), "")
    assert reply_format.parse(first.text) == ["calm answer"]
    details = dict(first.details)
    assert details.pop("load_seconds") > 0
    assert details == {
        "options": {
            **{"num_ctx": 128, "num_predict": 48, "temperature": 0.8},
            **{"top_k": 40, "top_p": 0.9, "seed": 17},
        },
        "device": "cpu",
        "dtype": "float32",
        "prompt_tokens": len("Write a prompt.") + 3,
        "reply_tokens": N_REPLY,
    }
    assert json.loads(json.dumps(first.details)) == first.details
    assert second.details["load_seconds"] == 0
    assert provider.name == f"transformers:{folder}"


def test_text_of_any_script(provider: TransformersProvider) -> None:
    text = 'é 落ち "\\ 🙂'
    completion = provider.complete(replace(REQUEST, prompt=text))
    assert completion.details["prompt_tokens"] == len(text.encode()) + 3
    assert completion.text == GOOD


def test_model_is_loaded_at_the_first_request(folder: Path) -> None:
    provider = provider_of(folder)
    assert provider.max_prompt_tokens == 80
    assert provider._loaded is None


def test_model_is_frozen(provider: TransformersProvider) -> None:
    provider.complete(REQUEST)
    assert provider._loaded is not None
    model = provider._loaded.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reply_follows_from_the_seed(folder: Path) -> None:
    provider = provider_of(folder, temperature=9.0, num_predict=12)
    requests = [replace(REQUEST, seed=seed) for seed in (0, 1, 2**31 - 1)] * 2
    texts = [provider.complete(request).text for request in requests]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_temperature_of_zero(folder: Path) -> None:
    provider = provider_of(folder, temperature=0)
    completions = [provider.complete(replace(REQUEST, seed=seed)) for seed in range(3)]
    assert {completion.text for completion in completions} == {GOOD}
    assert completions[0].details["options"] == {
        "num_ctx": 128,
        "num_predict": 48,
        "temperature": 0,
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_of_drawn_tokens(temperature: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5, -9.0]])
    sampling = _sampling(seed=3, temperature=temperature)
    ids = torch.zeros((1, 1), dtype=torch.long)
    n_draws = 4000
    counts = Counter(int(sampling(ids, logits).argmax()) for _ in range(n_draws))
    # The nucleus: the likeliest tokens until their probabilities reach nine tenths.
    likely = torch.softmax(logits[0] / temperature, dim=0)
    order = likely.argsort(descending=True)
    nucleus = order[: int((likely[order].cumsum(0) < 0.9).sum()) + 1]
    assert set(counts) == set(nucleus.tolist())
    for i in nucleus.tolist():
        expected = float(likely[i] / likely[nucleus].sum())
        assert counts[i] / n_draws == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_random_numbers_of_others_stay(folder: Path, temperature: float) -> None:
    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    provider = provider_of(folder, temperature=temperature)
    with torch.random.fork_rng():
        seed()
        expected = draws() + draws()
        seed()
        first = draws()
        assert provider.complete(REQUEST).text == GOOD  # Loads the model as well.
        assert provider.complete(REQUEST).text == GOOD
        assert first + draws() == expected


def test_reply_does_not_follow_from_global_seeds(folder: Path) -> None:
    provider = provider_of(folder, temperature=9.0, num_predict=12)
    texts = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            texts.append(provider.complete(REQUEST).text)
    assert texts[0] == texts[1]


def test_gradients_are_on_after_a_request(provider: TransformersProvider) -> None:
    provider.complete(REQUEST)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_reply_that_reaches_the_limit(folder: Path) -> None:
    completion = provider_of(folder, num_predict=3).complete(REQUEST)
    assert completion.text == '{"prompts":'
    assert completion.problem == "it was cut at num_predict=3 tokens"
    needed = provider_of(folder).complete(replace(REQUEST, max_tokens=3))
    assert (needed.text, needed.problem) == (completion.text, completion.problem)
    assert needed.details["options"]["num_predict"] == 3
    whole = provider_of(folder, num_predict=N_REPLY).complete(REQUEST)
    assert (whole.text, whole.problem) == (GOOD, "")


@pytest.mark.parametrize(
    ("num_ctx", "num_predict", "limit"),
    [(128, 48, 80), (100, 48, 52), (8192, 48, 80), (8192, 127, 1), (8192, 512, 0)],
)
def test_room_for_the_prompt(folder: Path, num_ctx: int, num_predict: int, limit: int) -> None:
    provider = provider_of(folder, num_ctx=num_ctx, num_predict=num_predict)
    assert provider.max_prompt_tokens == limit
    if num_predict == 48:
        fits = replace(REQUEST, prompt="a" * (limit - 3))
        assert provider.complete(fits).details["prompt_tokens"] == limit
    over = replace(REQUEST, prompt="a" * max(limit - 2, 0))
    with pytest.raises(ProviderError, match=f"prompt has .* tokens, .* room for {limit} beside"):
        provider.complete(over)


def test_room_without_a_config(tmp_path: Path) -> None:
    assert provider_of(tmp_path / "nowhere").max_prompt_tokens == 80


def test_deadline_ends_a_generation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = provider_of(folder, temperature=0)
    provider.complete(REQUEST)
    assert provider._loaded is not None
    model = provider._loaded.model
    forward = model.forward
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(transformers_module, "time", clock)

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.now += 1.0
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    with pytest.raises(ProviderError, match=r"did not finish within 3 seconds") as caught:
        provider.complete(replace(REQUEST, timeout=3))
    assert clock.now == 103.0  # One token a second: no fourth one was begun.
    assert not caught.value.transient
    with pytest.raises(ProviderError, match="did not finish within 0 seconds"):
        provider.complete(replace(REQUEST, timeout=0))
    assert clock.now == 103.0


def test_huge_timeout(provider: TransformersProvider) -> None:
    assert provider.complete(replace(REQUEST, timeout=1e10)).text == GOOD


def test_threads_load_the_model_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = AutoModelForCausalLM.from_pretrained

    def slow(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        time.sleep(0.1)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    provider = provider_of(folder)
    with ThreadPoolExecutor(4) as pool:
        completions = list(pool.map(provider.complete, [REQUEST] * 4))
    assert [completion.text for completion in completions] == [GOOD] * 4
    assert len(loads) == 1


def test_waiting_for_another_thread_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = provider_of(folder)
    load = AutoModelForCausalLM.from_pretrained
    loading, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        loading.set()
        go_on.wait()
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(provider.complete, REQUEST)
        try:
            loading.wait()
            with pytest.raises(ProviderError, match="other requests of this process took longer"):
                provider.complete(replace(REQUEST, timeout=0.1))
        finally:
            go_on.set()
        assert first.result().text == GOOD


def test_copies_and_pickles_have_no_weights(folder: Path) -> None:
    provider = provider_of(folder)
    provider.complete(REQUEST)
    twins = [copy.copy(provider), copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))]
    assert len(pickle.dumps(provider)) < 2000
    for twin in twins:
        assert twin._loaded is None
        assert twin.complete(REQUEST).text == GOOD


def test_dtype(folder: Path) -> None:
    completion = provider_of(folder, dtype="bfloat16").complete(REQUEST)
    assert completion.details["dtype"] == "bfloat16"
    assert completion.text == GOOD


def test_end_token_of_tokenizer_or_model(folder: Path, tmp_path: Path) -> None:
    by_tokenizer = shutil.copytree(folder, tmp_path / "a")
    edit(by_tokenizer, "generation_config.json", eos_token_id=None)
    edit(by_tokenizer, "config.json", eos_token_id=None)
    by_model = shutil.copytree(folder, tmp_path / "b")
    edit(by_model, "tokenizer_config.json", eos_token=None)
    edit(by_model, "generation_config.json", eos_token_id=[0, 1])
    for path in (by_tokenizer, by_model):
        completion = provider_of(path).complete(REQUEST)
        assert (completion.text.removesuffix("<end>"), completion.problem) == (GOOD, "")
        assert completion.details["reply_tokens"] == N_REPLY


def test_model_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ProviderError, match=rf"'{path}' has no chat template: .*instruct"):
        provider_of(path).complete(REQUEST)


def test_chat_template_that_fails(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "model")
    (path / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}")
    with pytest.raises(ProviderError, match="gave no answer: TemplateError: no user here"):
        provider_of(path).complete(REQUEST)


BROKEN = {
    "nothing there": lambda path: shutil.rmtree(path),
    "no config": lambda path: (path / "config.json").unlink(),
    "config is no JSON": lambda path: (path / "config.json").write_text("{"),
    "unknown architecture": lambda path: edit(path, "config.json", model_type="x"),
    "not a language model": lambda path: edit(path, "config.json", model_type="clip"),
    "code of its own": lambda path: edit(
        path, "config.json", model_type="x", auto_map={"AutoConfig": "m.C"}
    ),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "broken weights": lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 99),
    "weights of another size": lambda path: edit(path, "config.json", hidden_size=32),
    "broken tokenizer": lambda path: (path / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_broken_model(folder: Path, tmp_path: Path, damage: Any) -> None:
    path = shutil.copytree(folder, tmp_path / "model")
    damage(path)
    with pytest.raises(ProviderError, match=f"model '{path}' cannot be loaded: .") as caught:
        provider_of(path, local_files_only=True).complete(REQUEST)
    assert "\n" not in str(caught.value)
    assert not caught.value.transient


@pytest.mark.parametrize(
    "options", [{"device": "nowhere"}, {"device": "cuda:99"}, {"dtype": "float3"}]
)
def test_unknown_device_or_dtype(folder: Path, options: Any) -> None:
    with pytest.raises(ProviderError, match="cannot be loaded: "):
        provider_of(folder, **options).complete(REQUEST)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory.*a smaller model"),
        (RuntimeError("can't allocate memory: 9 bytes"), "allocate memory.*a smaller model"),
        (MemoryError(), "MemoryError; take a smaller model"),
        (RuntimeError("device-side assert\nmore"), "RuntimeError: device-side assert$"),
        (IndexError("index out of range"), "gave no answer: IndexError: index out of range$"),
    ],
)
def test_generation_that_fails(
    provider: TransformersProvider,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    provider.complete(REQUEST)
    assert provider._loaded is not None

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(provider._loaded.model, "generate", fail)
        with pytest.raises(ProviderError, match=message) as caught:
            provider.complete(REQUEST)
    assert not caught.value.transient
    assert provider.complete(REQUEST).text == GOOD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "`model` must be a folder or a name .* got an empty string"),
        ({"num_predict": 0}, "`num_predict` must be positive .* got 0 and 8192"),
        ({"num_ctx": 512}, "below `num_ctx`, got 512 and 512"),
        ({"temperature": -1}, "`temperature` must be at least 0, got -1"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0, got nan"),
    ],
)
def test_invalid_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersProvider(**({"model": "some/model"} | arguments))


def test_torch_is_imported_at_the_first_request() -> None:
    code = """
import sys
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.transformers import TransformersProvider
provider = TransformersProvider("some/model")
assert not {"torch", "transformers"} & set(sys.modules)
sys.modules["torch"] = None
try:
    provider.complete(CompletionRequest("Write a prompt.", {}, seed=0))
except ProviderError as error:
    print(error)
"""
    assert "pip install 'optuna-llm-catalyst[tuning]'" in run_python(code)


def test_process_ends_while_a_reply_is_written(
    folder: Path,
) -> None:
    """As after the last stage of a study that prefetches: a thread killed in torch would abort."""
    code = f"""
import time
from optuna_llm_catalyst import background
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.transformers import TransformersProvider
provider = TransformersProvider({str(folder)!r}, device="cpu", num_ctx=128, num_predict=48)
request = CompletionRequest("Write a prompt.", {{}}, seed=0)
provider.complete(request)
provider._loaded.model.generation_config.eos_token_id = None
provider._loaded.tokenizer.eos_token = None
provider._context, provider._num_predict = 40_000, 30_000
answer = background.start(lambda: provider.complete(request))
time.sleep(0.5)
assert not answer.done()
print("the end")
"""
    assert run_python(code).strip() == "the end"


def test_check_does_not_load_the_model(folder: Path) -> None:
    provider = provider_of(folder)
    provider.check()
    assert provider._loaded is None
    with pytest.raises(ProviderError, match="model 'nobody/nothing' cannot be loaded"):
        TransformersProvider("nobody/nothing").check()
