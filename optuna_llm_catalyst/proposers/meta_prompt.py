"""A study's history as the text that an LLM reads, within a budget of tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.sections import INSTRUCTIONS
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.proposers.sections import SECTIONS
from optuna_llm_catalyst.providers.base import estimated_tokens


#: Raised with every change of the wording, so that records tell which one was used.
VERSION = "3"


class BudgetError(CatalystError):
    """The instructions alone are longer than a prompt may be."""


@dataclass(frozen=True)
class MetaPrompt:
    """A meta-prompt and what it holds.

    Attributes:
        text: The text to send.
        sections: Names of the sections in it.
        n_points: How many prompts of the history it ranks.
        n_dropped: How many it had to leave out.
        dropped_sections: Sections that it had to leave out.
        estimated_tokens: Its length, counted conservatively.
        max_tokens: How long it may be; None for no limit.
    """

    text: str
    sections: tuple[str, ...]
    n_points: int
    n_dropped: int
    dropped_sections: tuple[str, ...]
    estimated_tokens: int
    max_tokens: int | None

    def facts(self) -> dict[str, Any]:
        """What the trial's record says of it, beside the text."""
        return {
            "template_version": VERSION,
            "sections": list(self.sections),
            "n_points": self.n_points,
            "n_dropped_points": self.n_dropped,
            "dropped_sections": list(self.dropped_sections),
            "estimated_prompt_tokens": self.estimated_tokens,
            "max_prompt_tokens": self.max_tokens,
        }


def build(
    request: ProposalRequest, options: MetaPromptOptions, *, max_tokens: int | None = None
) -> MetaPrompt:
    """The meta-prompt of a request.

    What does not fit is left out: prompts of the history, worst first, but never the best or the
    newest; then whole sections; never the instructions.

    Args:
        request: The history and how many prompts are wanted.
        options: What to tell beside it, and which sections.
        max_tokens: How long it may be, by a conservative count; None for no limit.

    Raises:
        BudgetError: If the instructions alone do not fit.
    """
    names = tuple(name for name in SECTIONS if name in {*options.sections, *INSTRUCTIONS})
    full: set[str] = set()
    for kept_points, kept_names in _ever_shorter(request, names):
        history = replace(request.history, points=kept_points)
        sent = replace(options, sections=kept_names)
        texts = {n: SECTIONS[n](replace(request, history=history), sent) for n in kept_names}
        shown = tuple(name for name, section in texts.items() if section)
        full = full or set(shown)
        text = "\n\n".join(texts[name] for name in shown)
        length = estimated_tokens(text)
        if max_tokens is None or length <= max_tokens:
            n_shown = len(kept_points) if texts.get("ranked_prompts") else 0
            return MetaPrompt(
                text=text,
                sections=shown,
                n_points=n_shown,
                n_dropped=len(request.history.points) - n_shown
                if "ranked_prompts" in names
                else 0,
                dropped_sections=tuple(n for n in names if n in full and n not in kept_names),
                estimated_tokens=length,
                max_tokens=max_tokens,
            )
    raise BudgetError(
        f"the instructions alone have about {length} tokens, {max_tokens} fit: raise `num_ctx` "
        "or shorten the task's description"
    )


def _ever_shorter(
    request: ProposalRequest, names: tuple[str, ...]
) -> Iterator[tuple[tuple[HistoryPoint, ...], tuple[str, ...]]]:
    """What to try to fit, from everything to the instructions."""
    points = list(request.history.points)
    yield tuple(points), names
    newest = max((point.trial_number for point in request.history.stages), default=None)
    for point in points[:0:-1]:  # Not the best.
        if point.kind != "stage" or point.trial_number != newest:
            points.remove(point)
            yield tuple(points), names
    # In their order: what stands far from the question is missed least.
    for name in [name for name in names if name not in INSTRUCTIONS]:
        names = tuple(kept for kept in names if kept != name)
        yield tuple(points), names
