"""A study's history as the text that an LLM reads, within a budget of tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.proposers.base import ProposalError
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.sections import INSTRUCTIONS
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.schema import encode


#: Raised with every change of the wording, so that records tell which one was used.
VERSION = "4"


@dataclass(frozen=True)
class MetaPrompt:
    """A meta-prompt, what it holds, and what it had to leave out."""

    text: str
    sections: tuple[str, ...]
    n_points: int  # Prompts of the history.
    n_dropped_points: int
    dropped_sections: tuple[str, ...]
    estimated_prompt_tokens: int
    max_prompt_tokens: int | None

    def facts(self) -> dict[str, Any]:
        """What the trial's record says of it, beside the text."""
        facts: dict[str, Any] = {"template_version": VERSION, **encode(self)}
        del facts["text"]
        return facts


def build(
    request: ProposalRequest, options: MetaPromptOptions, *, max_tokens: int | None = None
) -> MetaPrompt:
    """The meta-prompt of a request.

    What does not fit is left out: prompts of the history, worst first, but never the best or the
    newest; then whole sections; never the instructions. A ProposalError if these do not fit.
    """
    names = [name for name in SECTIONS if name in {*options.sections, *INSTRUCTIONS}]
    full: list[str] = []
    for history, kept in _ever_shorter(request.history, names):
        shorter, sent = replace(request, history=history), replace(options, sections=kept)
        texts = {name: SECTIONS[name](shorter, sent) for name in kept}
        shown = [name for name in kept if texts[name]]
        full = full or shown
        text = "\n\n".join(texts[name] for name in shown)
        length = estimated_tokens(text)
        if max_tokens is None or length <= max_tokens:
            n_ranked = len(history.points) if "ranked_prompts" in shown else 0
            n_all = len(request.history.points) if "ranked_prompts" in names else 0
            dropped = tuple(name for name in full if name not in kept)
            return MetaPrompt(
                text, tuple(shown), n_ranked, n_all - n_ranked, dropped, length, max_tokens
            )
    raise ProposalError(
        f"the instructions alone have about {length} tokens, {max_tokens} fit: raise `num_ctx` "
        "or shorten the task's description",
        {},
    )


def _ever_shorter(history: History, names: list[str]) -> Iterator[tuple[History, list[str]]]:
    """What to try to fit, from everything to the instructions."""
    yield history, names
    points = list(history.points)
    newest = max((point.trial_number for point in history.stages), default=None)
    for point in points[:0:-1]:  # Not the best.
        if point.kind != "stage" or point.trial_number != newest:
            points.remove(point)
            yield replace(history, points=tuple(points)), names
    # In their order: earlier sections matter least.
    for name in names:
        if name not in INSTRUCTIONS:
            names = [kept for kept in names if kept != name]
            yield replace(history, points=tuple(points)), names
