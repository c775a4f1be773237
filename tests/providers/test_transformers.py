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
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import Tokenizer
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.proposers import reply as reply_format
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers.chat_model import _Sampling
from optuna_llm_catalyst.providers.transformers import TransformersProvider
from tests.toy_stage import reply
from tests.toy_stage import run_python


GOOD = reply("calm answer")
REQUEST = CompletionRequest("Write a prompt.", reply_format.schema(1), seed=17, timeout=60)
N_POSITIONS = 128
SPECIALS = {"pad_token": "<pad>", "eos_token": "<end>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and what a chat is put together with."""
    names = ("<pad>", "<end>", "<user>", "<assistant>", "<think>")
    vocabulary = {token: i for i, token in enumerate((*names, *_bytes()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=list(names[2:]),
        chat_template=CHAT_TEMPLATE,
        **SPECIALS,
    )


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that answers everything with the same reply: learnt by heart in a moment."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=N_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    answer = torch.tensor(tokenizer.encode(f"<assistant>{GOOD}<end>"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(120):
            before = torch.randint(5, len(tokenizer), (8, 4 + 7 * step % 76))
            ids = torch.cat([before, answer.expand(8, -1)], dim=1)
            labels = ids.masked_fill(torch.arange(ids.shape[1]) <= before.shape[1], -100)
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model as the hub has them."""
    path = tmp_path_factory.mktemp("chat-model")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # As the models of the hub recommend themselves: none of it may warn or draw numbers.
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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


def test_a_completion_carries_the_reply_and_the_facts_for_the_record(folder: Path) -> None:
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
        "reply_tokens": len(GOOD) + 1,
    }
    assert json.loads(json.dumps(first.details)) == first.details
    assert second.details["load_seconds"] == 0
    assert provider.name == f"transformers:{folder}"


def test_text_of_any_script_reaches_the_model(provider: TransformersProvider) -> None:
    text = 'é 落ち "\\ 🙂'
    completion = provider.complete(replace(REQUEST, prompt=text))
    assert completion.details["prompt_tokens"] == len(text.encode()) + 3
    assert completion.text == GOOD


def test_nothing_is_loaded_before_the_first_request(folder: Path) -> None:
    provider = provider_of(folder)
    assert provider.max_prompt_tokens == 80
    assert provider._loaded is None


def test_the_model_is_loaded_frozen(provider: TransformersProvider) -> None:
    provider.complete(REQUEST)
    assert provider._loaded is not None
    model = provider._loaded.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_same_request_has_the_same_reply_and_other_seeds_have_others(folder: Path) -> None:
    provider = provider_of(folder, temperature=9.0, num_predict=12)
    requests = [replace(REQUEST, seed=seed) for seed in (0, 1, 2**31 - 1)] * 2
    texts = [provider.complete(request).text for request in requests]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_a_temperature_of_zero_takes_no_chances(folder: Path) -> None:
    provider = provider_of(folder, temperature=0)
    completions = [provider.complete(replace(REQUEST, seed=seed)) for seed in range(3)]
    assert {completion.text for completion in completions} == {GOOD}
    assert completions[0].details["options"] == {
        "num_ctx": 128,
        "num_predict": 48,
        "temperature": 0,
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5, -9.0]])
    sampling = _Sampling(seed=3, temperature=temperature)
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
def test_a_training_loop_draws_the_numbers_that_it_would_have_drawn(
    folder: Path, temperature: float
) -> None:
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


def test_a_reply_does_not_follow_from_the_numbers_of_the_training_loop(folder: Path) -> None:
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


def test_a_reply_that_reaches_the_limit_is_known_to_be_cut(folder: Path) -> None:
    completion = provider_of(folder, num_predict=10).complete(REQUEST)
    assert completion.text == GOOD[:10]
    assert completion.problem == "it was cut at num_predict=10 tokens"
    whole = provider_of(folder, num_predict=len(GOOD) + 1).complete(REQUEST)
    assert (whole.text, whole.problem) == (GOOD, "")


@pytest.mark.parametrize(
    ("num_ctx", "num_predict", "limit"),
    [(128, 48, 80), (100, 48, 52), (8192, 48, 80), (8192, 127, 1), (8192, 512, 0)],
)
def test_the_prompt_has_the_room_that_the_model_and_the_reply_leave(
    folder: Path, num_ctx: int, num_predict: int, limit: int
) -> None:
    provider = provider_of(folder, num_ctx=num_ctx, num_predict=num_predict)
    assert provider.max_prompt_tokens == limit
    if num_predict == 48:
        fits = replace(REQUEST, prompt="a" * (limit - 3))
        assert provider.complete(fits).details["prompt_tokens"] == limit
    over = replace(REQUEST, prompt="a" * max(limit - 2, 0))
    with pytest.raises(ProviderError, match=f"prompt has .* tokens, .* room for {limit} beside"):
        provider.complete(over)


def test_a_model_that_cannot_be_read_has_the_limit_of_the_arguments(tmp_path: Path) -> None:
    assert provider_of(tmp_path / "nowhere").max_prompt_tokens == 80


def test_the_deadline_ends_a_generation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = provider_of(folder, temperature=0)
    provider.complete(REQUEST)
    assert provider._loaded is not None
    model = provider._loaded.model
    forward = model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    started = time.monotonic()
    with pytest.raises(ProviderError, match=r"did not finish within 0\.3 seconds") as caught:
        provider.complete(replace(REQUEST, timeout=0.3))
    assert time.monotonic() - started < 5
    assert not caught.value.transient
    with pytest.raises(ProviderError, match="did not finish within 0 seconds"):
        provider.complete(replace(REQUEST, timeout=0))


def test_threads_that_ask_at_once_load_the_model_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_waiting_for_another_thread_counts_as_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = provider_of(folder)
    load = AutoModelForCausalLM.from_pretrained

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.6)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(provider.complete, REQUEST)
        time.sleep(0.1)
        with pytest.raises(ProviderError, match="other requests of this process took longer"):
            provider.complete(replace(REQUEST, timeout=0.1))
        assert first.result().text == GOOD


def test_copies_and_pickles_leave_the_weights_behind(folder: Path) -> None:
    provider = provider_of(folder)
    provider.complete(REQUEST)
    twins = [copy.copy(provider), copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))]
    assert len(pickle.dumps(provider)) < 2000
    for twin in twins:
        assert twin._loaded is None
        assert twin.complete(REQUEST).text == GOOD


def test_a_dtype_is_the_one_of_the_loaded_weights(folder: Path) -> None:
    completion = provider_of(folder, dtype="bfloat16").complete(REQUEST)
    assert completion.details["dtype"] == "bfloat16"
    assert completion.text == GOOD


def test_the_end_of_a_turn_is_known_by_the_tokenizer_or_by_the_model(
    folder: Path, tmp_path: Path
) -> None:
    by_tokenizer = shutil.copytree(folder, tmp_path / "a")
    edit(by_tokenizer, "generation_config.json", eos_token_id=None)
    edit(by_tokenizer, "config.json", eos_token_id=None)
    by_model = shutil.copytree(folder, tmp_path / "b")
    edit(by_model, "tokenizer_config.json", eos_token=None)
    edit(by_model, "generation_config.json", eos_token_id=[0, 1])
    for path in (by_tokenizer, by_model):
        completion = provider_of(path).complete(REQUEST)
        assert (completion.text.removesuffix("<end>"), completion.problem) == (GOOD, "")
        assert completion.details["reply_tokens"] == len(GOOD) + 1


def test_a_model_that_is_not_to_be_chatted_with_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ProviderError, match=rf"'{path}' has no chat template: .*instruct"):
        provider_of(path).complete(REQUEST)


def test_a_chat_template_that_fails_is_an_error(folder: Path, tmp_path: Path) -> None:
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
def test_a_model_that_cannot_be_loaded_is_an_error_that_names_it(
    folder: Path, tmp_path: Path, damage: Any
) -> None:
    path = shutil.copytree(folder, tmp_path / "model")
    damage(path)
    with pytest.raises(ProviderError, match=f"model '{path}' cannot be loaded: .") as caught:
        provider_of(path, local_files_only=True).complete(REQUEST)
    assert "\n" not in str(caught.value)
    assert not caught.value.transient


@pytest.mark.parametrize(
    "options", [{"device": "nowhere"}, {"device": "cuda:99"}, {"dtype": "float3"}]
)
def test_a_device_or_dtype_that_is_none_is_an_error(folder: Path, options: Any) -> None:
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
def test_a_generation_that_fails_is_an_error(
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
def test_an_argument_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersProvider(**({"model": "some/model"} | arguments))


def test_torch_is_imported_for_a_request_and_not_before() -> None:
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


def test_a_process_ends_in_order_while_a_reply_is_written_that_nobody_waits_for(
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


def test_the_check_looks_for_the_model_without_loading_it(folder: Path) -> None:
    provider = provider_of(folder)
    provider.check()
    assert provider._loaded is None
    with pytest.raises(ProviderError, match="model 'nobody/nothing' cannot be loaded"):
        TransformersProvider("nobody/nothing").check()
