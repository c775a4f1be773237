"""What holds for every provider: a new one is one file, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
import copy
import json
from pathlib import Path
import pickle

import pytest

from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import OpenAICompatibleProvider
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst import TransformersProvider
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import Provider
from tests.ollama_server import OllamaServer
from tests.openai_server import OpenAIServer
from tests.providers import tiny_chat


REQUEST = CompletionRequest("Write a prompt.", reply.schema(1), seed=3)
GOOD = '{"prompts": ["calm answer"]}'


@contextmanager
def ollama(_: Path) -> Iterator[Provider]:
    with OllamaServer(lambda body: GOOD) as server:
        yield OllamaProvider(host=server.url)


@contextmanager
def openai(_: Path) -> Iterator[Provider]:
    with OpenAIServer(lambda body: GOOD) as server:
        yield OpenAICompatibleProvider(server.models[0], base_url=server.url)


@contextmanager
def replay(_: Path) -> Iterator[Provider]:
    yield ReplayProvider([GOOD])


@contextmanager
def transformers(folder: Path) -> Iterator[Provider]:
    tiny_chat.save(folder)
    yield TransformersProvider(str(folder), device="cpu", num_ctx=128, num_predict=48)


WORKING = [ollama, openai, replay, transformers]
#: Nobody listens at port 9, and there is no such file of weights.
BROKEN: list[Provider] = [
    OllamaProvider(host="http://127.0.0.1:9"),
    OpenAICompatibleProvider("m", base_url="http://127.0.0.1:9/v1"),
    ReplayProvider([]),
    TransformersProvider("/nowhere/at/all"),
]


@pytest.mark.parametrize("make", WORKING)
def test_provider_and_its_copies(
    make: Callable[[Path], AbstractContextManager[Provider]], tmp_path: Path
) -> None:
    with make(tmp_path) as provider:
        completion = provider.complete(REQUEST)
        assert reply.parse(completion.text)
        assert completion.problem == "" and completion.model
        assert json.loads(json.dumps(completion.details)) == completion.details
        kind, _, model = provider.name.partition(":")
        assert kind and model
        assert provider.max_prompt_tokens is None or provider.max_prompt_tokens > 0
        for twin in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
            assert twin.name == provider.name
            assert twin.max_prompt_tokens == provider.max_prompt_tokens
            assert twin.complete(REQUEST).text == completion.text


@pytest.mark.parametrize("provider", BROKEN, ids=lambda provider: provider.name)
def test_broken_provider(provider: Provider) -> None:
    with pytest.raises(ProviderError) as caught:
        provider.complete(REQUEST)
    assert str(caught.value)
