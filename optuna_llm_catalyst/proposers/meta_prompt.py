"""A study's history as the text that an LLM is asked with. Pure.

Sections are functions of the request; an empty one is left out. The ranking is worst first and
best last, where a model reads it best and where an over-long prompt is cut last (the paper's
order; arXiv 2405.19732).
"""

from __future__ import annotations

import json

from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.proposers.base import ProposalRequest


#: Raised with every change of the wording, so that records tell which one was used.
VERSION = "1"


def build(request: ProposalRequest, task_description: str) -> str:
    """The meta-prompt of a request.

    Args:
        request: The history and how many prompts are wanted.
        task_description: What the frozen model shall do, in the user's words.
    """
    sections = (
        _task(request, task_description),
        _ranked_prompts(request),
        _in_flight(request),
        _wanted(request),
    )
    return "\n\n".join(section for section in sections if section)


def _task(request: ProposalRequest, task_description: str) -> str:
    task = task_description.strip() or "(not described)"
    return (
        "You plan restarts for prompt tuning. A short prompt starts a round of gradient descent "
        "on the prompt's embeddings, in front of a frozen language model. Gradient descent only "
        "searches nearby, so where it starts decides how far it gets. You see how earlier starts "
        f"went and choose new ones.\n\nTask of the frozen model: {task}"
    )


def _ranked_prompts(request: ProposalRequest) -> str:
    points = request.history.points
    if not points:
        return "No prompt has been tried yet."
    better = "lower" if request.history.minimize else "higher"
    lines = [_line(point, request.history.minimize) for point in reversed(points)]
    return f"Prompts tried so far, worst first, best last ({better} is better):\n" + "\n".join(
        lines
    )


def _line(point: HistoryPoint, minimize: bool) -> str:
    name = "loss" if minimize else "value"
    parts = [f"{name} {_arrow(point.before, point.value)}"]
    if point.kind != "stage":
        parts = [f"{name} {point.value:.3f} without training"]
    if point.accuracy is not None:
        parts.append(f"accuracy {_arrow(point.accuracy_before, point.accuracy)}")
    if point.pruned:
        parts.append("stopped early")
    return f"- {_quoted(point.prompt.text)}: " + ", ".join(parts)


def _quoted(text: str) -> str:
    """One line, whatever tokens the prompt is made of."""
    return json.dumps(text, ensure_ascii=False)


def _arrow(before: float | None, after: float) -> str:
    if before is None:
        return f"{after:.3f}"
    return f"{before:.3f} before training, {after:.3f} after"


def _in_flight(request: ProposalRequest) -> str:
    prompts = request.history.in_flight
    if not prompts:
        return ""
    lines = [f"- {_quoted(prompt.text)}" for prompt in prompts]
    return "Being tried right now by other workers, do not repeat:\n" + "\n".join(lines)


def _wanted(request: ProposalRequest) -> str:
    length = request.space.num_virtual_tokens
    return (
        f"Write {request.n_candidates} new prompts. Each is cut at {length} tokens of the "
        f"model's tokenizer, so use at most {length} short words. They must differ from each "
        "other and from every prompt above. Keep what the good ones share, and try wordings that "
        "name the task in other ways.\n"
        'Answer with JSON only: {"prompts": ["...", "..."]}'
    )
