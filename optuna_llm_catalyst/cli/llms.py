"""``--llm`` to a proposer, with one clear line about which one it is."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers import OllamaProvider
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider
from optuna_llm_catalyst.providers.ollama import DEFAULT_MODEL


_GET_OLLAMA = (
    f"For LLM restarts install Ollama (https://ollama.com), run `ollama pull {DEFAULT_MODEL}`, "
    "and repeat this command."
)
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ChosenLLM:
    """The LLM to use, None for mutation, and a line that says so."""

    provider: Provider | None
    line: str


def choose_llm(llm: str) -> ChosenLLM:
    """Finds the LLM of ``--llm``.

    ``auto`` takes what is there; an LLM that is asked for by name must be there.
    """
    kind, _, rest = llm.partition(":")
    if llm == "auto":
        return _auto()
    if llm == "mutation":
        return ChosenLLM(None, "Restarts are proposed by mutation (--llm mutation).")
    if kind == "ollama":
        provider = OllamaProvider(rest or DEFAULT_MODEL)
        try:
            provider.check()
        except ProviderError as error:
            raise UserError(f"--llm {llm}: {error}") from error
        return ChosenLLM(provider, _proposed_by(provider))
    if kind == "replay" and rest:
        return ChosenLLM(ReplayProvider(rest), f"Restarts are replayed from {rest}.")
    raise UserError(f"--llm {llm!r} is none of auto, ollama:MODEL, mutation, replay:FILE.")


def _auto() -> ChosenLLM:
    provider = OllamaProvider(DEFAULT_MODEL, timeout=_PROBE_TIMEOUT_S)
    try:
        provider.check()
    except ProviderError as error:
        return ChosenLLM(None, f"Restarts are proposed by mutation: {error}. {_GET_OLLAMA}")
    return ChosenLLM(OllamaProvider(DEFAULT_MODEL), _proposed_by(provider))


def _proposed_by(provider: OllamaProvider) -> str:
    return f"Restarts are proposed by {provider.model} (Ollama at {provider.host})."
