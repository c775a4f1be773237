"""The provider, the doctor and a small study against a real server.

Name the server and a model of it, as in
``LLM_CATALYST_TEST_OLLAMA=http://127.0.0.1:11434,gemma3:4b`` or
``LLM_CATALYST_TEST_OPENAI=http://127.0.0.1:8000/v1,qwen3-4b``.
"""

from __future__ import annotations

from collections.abc import Iterator
import os

import optuna
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import OpenAICompatibleProvider
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli.doctor import _llm
from optuna_llm_catalyst.cli.llms import LLMOptions
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import Provider
from tests.toy_stage import ToyObjective
from tests.toy_stage import word_space


VARIABLES = {"ollama": "LLM_CATALYST_TEST_OLLAMA", "openai": "LLM_CATALYST_TEST_OPENAI"}
REQUEST = CompletionRequest(
    "Write two short prompts that ask for the topic of a message.\n"
    'Answer with JSON only, as in {"prompts": ["Which topic is it?", "Name the topic."]}',
    reply.schema(2),
    seed=7,
    max_tokens=256,
)


@pytest.fixture(params=VARIABLES)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str]]:
    """The kind of server, its URL, and a model."""
    variable = VARIABLES[request.param]
    url, _, model = os.environ.get(variable, "").partition(",")
    if not url or not model:
        pytest.skip(f"{variable}=URL,MODEL names no server")
    yield request.param, url, model


@pytest.fixture
def provider(named: tuple[str, str, str]) -> Provider:
    kind, url, model = named
    if kind == "ollama":
        return OllamaProvider(model, host=url)
    return OpenAICompatibleProvider(model, base_url=url)


def test_completion(provider: OllamaProvider | OpenAICompatibleProvider) -> None:
    provider.check()
    assert provider.models()
    completion = provider.complete(REQUEST)
    assert completion.text.strip() and completion.model
    assert 0 < completion.details["prompt_tokens"] < provider.max_prompt_tokens
    assert 0 < completion.details["reply_tokens"] <= 256
    if completion.problem == "" and "format" not in completion.details:
        assert len(reply.parse(completion.text)) <= 2


def test_doctor(named: tuple[str, str, str]) -> None:
    kind, url, model = named
    options = LLMOptions(f"{kind}:{model}", llm_url=url, llm_api_key="", num_ctx=4096)
    findings = {finding.what.strip(): finding for finding in _llm(options)}
    assert findings[f"LLM {kind}:{model}"].ok
    assert findings["first answer"].ok and findings["second answer"].ok


def test_study(provider: Provider) -> None:
    space = word_space(3)
    sampler = LLMCatalystSampler(space, provider, task_description="Sort messages.", seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(ToyObjective(space), n_trials=5)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
    attempts = [
        attempt
        for trial in study.trials
        for attempt in (records.load(trial, "proposal") or {}).get("attempts", [])
    ]
    assert attempts and not any("error" in attempt for attempt in attempts)
