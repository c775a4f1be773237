"""``--llm`` to a provider, with one clear line about which one it is."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers import OllamaProvider
from optuna_llm_catalyst.providers import OpenAICompatibleProvider
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider
from optuna_llm_catalyst.providers import TransformersProvider
from optuna_llm_catalyst.providers.ollama import DEFAULT_MODEL


KINDS = "auto, ollama:MODEL, openai:MODEL, transformers:MODEL, mutation, replay:FILE"
_GET_OLLAMA = (
    f"For LLM restarts install Ollama (https://ollama.com), run `ollama pull {DEFAULT_MODEL}`, "
    "and repeat this command."
)


@dataclass(frozen=True)
class LLMOptions:
    """Which LLM, and where. Named as on the command line.

    Attributes:
        llm: One of :data:`KINDS`.
        llm_url: Its server; empty for the provider's default.
        llm_api_key: The key for that server; empty for none.
        num_ctx: Its context length in tokens.
        device: Where it runs, if in this process.
    """

    llm: str
    llm_url: str
    llm_api_key: str
    num_ctx: int
    device: str = "auto"


@dataclass(frozen=True)
class ChosenLLM:
    """The LLM to use, None for mutation, and a line that says so."""

    provider: Provider | None
    line: str


def choose_llm(options: LLMOptions) -> ChosenLLM:
    """Finds the LLM of ``--llm``.

    ``auto`` takes what is there; an LLM that is asked for by name must be there.
    """
    kind, _, name = options.llm.partition(":")
    if options.llm_api_key and kind != "openai":
        raise UserError("--llm-api-key is for --llm openai:MODEL; Ollama's is OLLAMA_API_KEY.")
    if options.llm == "mutation":
        return ChosenLLM(None, "Restarts are proposed by mutation (--llm mutation).")
    if kind == "replay" and name:
        return ChosenLLM(ReplayProvider(name), f"Restarts are replayed from {name}.")
    try:
        with user_input():
            return _live(kind, name, options)
    except ProviderError as error:
        if options.llm == "auto":
            return ChosenLLM(None, f"Restarts are proposed by mutation: {error}. {_GET_OLLAMA}")
        raise UserError(f"--llm {options.llm}: {error}") from error


def _live(kind: str, name: str, options: LLMOptions) -> ChosenLLM:
    if options.llm == "auto" or kind == "ollama":
        ollama = OllamaProvider(
            name or DEFAULT_MODEL, host=options.llm_url or None, num_ctx=options.num_ctx
        )
        ollama.check()
        return _proposed_by(ollama, f"Ollama at {ollama.host}")
    if kind == "openai" and name:
        if not options.llm_url:
            raise UserError(
                f"--llm {options.llm} needs the server: --llm-url http://localhost:8000/v1"
            )
        openai = OpenAICompatibleProvider(
            name,
            base_url=options.llm_url,
            api_key=options.llm_api_key or None,
            num_ctx=options.num_ctx,
        )
        openai.check()
        return _proposed_by(openai, f"the server at {openai.base_url}")
    if kind == "transformers" and name:
        chat = TransformersProvider(name, device=options.device, num_ctx=options.num_ctx)
        chat.check()
        return _proposed_by(chat, "this process")
    raise UserError(f"--llm {options.llm!r} is none of {KINDS}.")


def _proposed_by(provider: Provider, where: str) -> ChosenLLM:
    model = provider.name.partition(":")[2]
    return ChosenLLM(provider, f"Restarts are proposed by {model} ({where}).")
