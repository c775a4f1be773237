"""``--llm`` to a provider, with one clear line about which one it is."""

from __future__ import annotations

import os
from pathlib import Path

from optuna_llm_catalyst import providers
from optuna_llm_catalyst.cli.options import KINDS
from optuna_llm_catalyst.cli.options import LLMOptions
from optuna_llm_catalyst.cli.output import UserError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.ollama import DEFAULT_MODEL


def choose_llm(
    options: LLMOptions, *, device: str = "auto", recorded: Path | None = None
) -> tuple[providers.Provider | None, str]:
    """Finds the LLM of ``--llm``; ``auto`` takes what is there, one that is named must be there.

    Returns the LLM, None for mutation, and a line that says so. ``device`` is for an LLM in this
    process, ``recorded`` a file of replies that take Ollama's place where it does not answer.
    """
    kind, _, name = options.llm.partition(":")
    if options.llm_api_key and kind != "openai":
        raise UserError("--llm-api-key is for --llm openai:MODEL; Ollama's is OLLAMA_API_KEY.")
    if options.llm == "mutation":
        return None, "Restarts are proposed by mutation (--llm mutation)."
    if kind == "replay" and name:
        return providers.ReplayProvider(name), f"Restarts are replayed from {name}."
    try:
        if options.llm == "auto":
            provider, where = _auto(options)
        elif kind == "ollama":
            provider, where = _ollama(name or DEFAULT_MODEL, options)
        elif kind == "openai":
            provider, where = _openai(name, options)
        elif kind == "transformers" and name:
            chat = providers.TransformersProvider(name, device=device, num_ctx=options.num_ctx)
            chat.check()
            provider, where = chat, "this process"
        else:
            raise UserError(f"--llm {options.llm!r} is none of {KINDS}.")
    except ProviderError as error:
        if options.llm == "auto" and recorded is not None:
            return providers.ReplayProvider(recorded), (
                "Starts are replies of a large LLM that were recorded for this demo, as "
                f"{str(error).rstrip('.')}. With Ollama (https://ollama.com) and `ollama pull "
                f"{DEFAULT_MODEL}` an LLM of yours takes its place."
            )
        if options.llm == "auto":
            return None, (
                f"Restarts are proposed by mutation: {str(error).rstrip('.')}. For LLM restarts "
                f"install Ollama (https://ollama.com), run `ollama pull {DEFAULT_MODEL}`, and "
                "repeat this command."
            )
        raise UserError(f"--llm {options.llm}: {error}") from error
    model = provider.name.partition(":")[2]
    return provider, f"Restarts are proposed by {model} ({where})."


def _auto(options: LLMOptions) -> tuple[providers.Provider, str]:
    """Ollama's default model, or else the newest installed one that chats."""
    server = providers.OllamaProvider(host=options.llm_url or None)
    other = None if DEFAULT_MODEL in server.models() else server.installed_chat_model()
    if other is None:
        return _ollama(DEFAULT_MODEL, options)
    provider, where = _ollama(other, options)
    why = f"{DEFAULT_MODEL} is not installed, of the chat models there this one is the newest"
    return provider, f"{where}; {why}"


def _ollama(name: str, options: LLMOptions) -> tuple[providers.Provider, str]:
    ollama = providers.OllamaProvider(name, host=options.llm_url or None, num_ctx=options.num_ctx)
    ollama.check()
    return ollama, f"Ollama at {ollama.host}"


def _openai(name: str, options: LLMOptions) -> tuple[providers.Provider, str]:
    if not options.llm_url:
        raise UserError(
            f"--llm {options.llm} needs the server: --llm-url http://localhost:8000/v1"
        )
    openai = providers.OpenAICompatibleProvider(
        name,
        base_url=options.llm_url,
        api_key=options.llm_api_key or os.environ.get("LLM_CATALYST_API_KEY") or None,
        num_ctx=options.num_ctx,
    )
    openai.check()
    return openai, openai.note or f"the server at {openai.base_url}"
