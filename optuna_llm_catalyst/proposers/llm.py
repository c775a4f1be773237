"""Restart prompts from an LLM: history to meta-prompt, to reply, to candidates."""

from __future__ import annotations

from typing import Any

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import InvalidReplyError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import Proposal
from optuna_llm_catalyst.proposers.base import ProposalError
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import Provider


class LLMProposer:
    """Asks an LLM for restart prompts.

    Args:
        provider: Where completions come from.
        task_description: What the frozen model shall do, in one or two sentences.
    """

    def __init__(self, provider: Provider, task_description: str = "") -> None:
        self._provider = provider
        self._task_description = task_description

    def propose(self, request: ProposalRequest) -> Proposal:
        prompt = meta_prompt.build(request, self._task_description)
        details: dict[str, Any] = {
            "proposer": "llm",
            "provider": self._provider.name,
            "seed": request.seed,
            "template_version": meta_prompt.VERSION,
            "meta_prompt": records.clip(prompt),
        }
        try:
            completion = self._provider.complete(
                CompletionRequest(
                    prompt=prompt,
                    schema=reply.schema(request.n_candidates),
                    seed=request.seed,
                    trial_number=request.trial_number,
                    call_index=request.history.n_llm_calls,
                )
            )
            details |= completion.details
            details |= {"model": completion.model, "reply": records.clip(completion.text)}
            texts = reply.parse(completion.text)
        except (ProviderError, InvalidReplyError) as error:
            raise ProposalError(f"{type(error).__name__}: {error}", details) from error
        prompts = _encodable(texts[: request.n_candidates], request.space)
        if not prompts:
            raise ProposalError("no candidate has a token in the model's vocabulary", details)
        return Proposal(prompts, "llm", details)


def _encodable(texts: list[str], space: PromptSpace) -> tuple[RestartPrompt, ...]:
    prompts = []
    for text in texts:
        try:
            prompts.append(space.from_text(text))
        except ValueError:
            continue  # The raw reply, which is recorded, shows what was passed over.
    return tuple(prompts)
