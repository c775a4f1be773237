"""The provider, the doctor and a small study against a real server.

Name the server and a model of it, as in
``LLM_CATALYST_TEST_OLLAMA=http://127.0.0.1:11434,gemma3:4b`` or
``LLM_CATALYST_TEST_OPENAI=http://127.0.0.1:8000/v1,qwen3-4b``.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import OllamaProvider
from optuna_llm_catalyst import OpenAICompatibleProvider
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import Provider
from tests.prompt_tuning.tiny import make_encoder
from tests.toy_stage import run_python
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


def test_doctor(named: tuple[str, str, str], tmp_path: Path) -> None:
    kind, url, model = named
    encoder, tokenizer = make_encoder()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["", "doctor", "--llm", f"{kind}:{model}", "--llm-url", url, "--json"]
    code = (
        "import sys\n"
        f"sys.argv = {[*arguments, '--model', str(tmp_path)]!r}\n"
        "from optuna_llm_catalyst.cli.app import run\n"
        "run()"
    )
    findings = {row["what"].strip(): row for row in json.loads(run_python(code))}
    for what in (f"LLM {kind}:{model}", "first reply", "second reply"):
        assert findings[what]["ok"], findings[what]


def test_study(provider: Provider) -> None:
    space = word_space(3)
    sampler = LLMCatalystSampler(space, provider, task_description="Sort messages.", seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(ToyObjective(space), n_trials=5)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
    attempts = [
        attempt
        for trial in study.trials
        for attempt in (records.load(trial, "proposal", dict[str, Any]) or {}).get("attempts", [])
    ]
    assert attempts and not any("error" in attempt for attempt in attempts)
