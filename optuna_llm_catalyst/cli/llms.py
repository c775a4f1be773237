"""``--llm`` to a provider, with one clear line about which one it is."""

from __future__ import annotations

from dataclasses import dataclass
import os

from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.options import KINDS
from optuna_llm_catalyst.cli.options import LLMOptions
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers import OllamaProvider
from optuna_llm_catalyst.providers import OpenAICompatibleProvider
from optuna_llm_catalyst.providers import Provider
from optuna_llm_catalyst.providers import ReplayProvider
from optuna_llm_catalyst.providers import TransformersProvider
from optuna_llm_catalyst.providers.ollama import DEFAULT_MODEL


KEY_VARIABLE = "LLM_CATALYST_API_KEY"
_GET_OLLAMA = (
    f"For LLM restarts install Ollama (https://ollama.com), run `ollama pull {DEFAULT_MODEL}`, "
    "and repeat this command."
)


@dataclass(frozen=True)
class ChosenLLM:
    """The LLM to use, None for mutation, and a line that says so."""

    provider: Provider | None
    line: str


def choose_llm(options: LLMOptions, *, device: str = "auto") -> ChosenLLM:
    """Finds the LLM of ``--llm``.

    ``auto`` takes what is there; an LLM that is named must be there.

    Args:
        options: The options.
        device: Where the LLM runs, if in this process.
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
            if options.llm == "auto":
                return _auto(options)
            if kind == "ollama":
                return _ollama(name or DEFAULT_MODEL, options)
            if kind == "openai":
                return _openai(name, options)
            if kind == "transformers" and name:
                chat = TransformersProvider(name, device=device, num_ctx=options.num_ctx)
                chat.check()
                return _proposed_by(chat, "this process")
    except ProviderError as error:
        if options.llm == "auto":
            reason = str(error).rstrip(".")
            return ChosenLLM(None, f"Restarts are proposed by mutation: {reason}. {_GET_OLLAMA}")
        raise UserError(f"--llm {options.llm}: {error}") from error
    raise UserError(f"--llm {options.llm!r} is none of {KINDS}.")


def _auto(options: LLMOptions) -> ChosenLLM:
    """Ollama's default model, or else the newest installed one that chats."""
    try:
        return _ollama(DEFAULT_MODEL, options)
    except ProviderError:
        other = OllamaProvider(host=options.llm_url or None).installed_chat_model()
        if other is None:
            raise
    why = f"; {DEFAULT_MODEL} is not installed, of the chat models there this one is the newest"
    return _ollama(other, options, why=why)


def _ollama(name: str, options: LLMOptions, *, why: str = "") -> ChosenLLM:
    ollama = OllamaProvider(name, host=options.llm_url or None, num_ctx=options.num_ctx)
    ollama.check()
    return _proposed_by(ollama, f"Ollama at {ollama.host}{why}")


def _openai(name: str, options: LLMOptions) -> ChosenLLM:
    if not options.llm_url:
        raise UserError(
            f"--llm {options.llm} needs the server: --llm-url http://localhost:8000/v1"
        )
    openai = OpenAICompatibleProvider(
        name,
        base_url=options.llm_url,
        api_key=options.llm_api_key or os.environ.get(KEY_VARIABLE) or None,
        num_ctx=options.num_ctx,
    )
    openai.check()
    return _proposed_by(openai, openai.note or f"the server at {openai.base_url}")


def _proposed_by(provider: Provider, where: str) -> ChosenLLM:
    model = provider.name.partition(":")[2]
    return ChosenLLM(provider, f"Restarts are proposed by {model} ({where}).")
