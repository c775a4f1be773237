"""What the sections of a meta-prompt are made of: counts, lists, quotes, lines. Pure."""

from __future__ import annotations

from collections.abc import Sequence
import json
from typing import Any

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import directions
from optuna_llm_catalyst.proposers.base import ProposalRequest


MAX_EXAMPLE = 200
_MAX_CONFUSIONS = 6


def counted(n: int, noun: str) -> str:
    """A number of things."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listed(title: str, lines: Sequence[str]) -> str:
    """A title and a line for each item; empty if there are none."""
    return "\n- ".join([title, *lines]) if lines else ""


def quoted(text: str) -> str:
    """One line between quotation marks, whatever tokens or texts it is made of."""
    encoded = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in encoded)


def cut(text: str) -> str:
    """A text of the task, not too long."""
    return text if len(text) <= MAX_EXAMPLE else text[:MAX_EXAMPLE] + "…"


def shown(prompt: RestartPrompt, request: ProposalRequest) -> str:
    """A prompt without padding, so that the LLM does not copy it."""
    return quoted(request.space.without_padding(prompt))


def mistaken(mistakes: Mistakes | None, *, with_texts: bool) -> list[str]:
    """Which labels are taken for which, and texts of which that is true."""
    if mistakes is None:
        return []
    lines = [
        f"{one_line(c.label)} taken for {one_line(c.predicted)}: {c.count} of {c.total}"
        for c in mistakes.confusions[:_MAX_CONFUSIONS]
    ]
    for t in mistakes.texts if with_texts else ():
        texts = " / ".join(quoted(cut(x)) for x in (t.text, t.text_pair) if x is not None)
        lines.append(f"{texts} is {one_line(t.label)}, taken for {one_line(t.predicted)}")
    return lines


def point_line(point: HistoryPoint, request: ProposalRequest) -> str:
    """A prompt of the history and what is known of it."""
    is_stage = point.kind == "stage"
    told = _arrow(point.before, point.value) if is_stage else f"{point.value:.3f} without training"
    parts = [f"{directions.value_name(request.history)} {told}"]
    if point.accuracy is not None:
        parts.append(f"accuracy {_arrow(point.accuracy_before, point.accuracy)}")
    if point.pruned:
        parts.append("stopped early")
    if point.prompt.n_truncated:
        parts.append(f"cut by {counted(point.prompt.n_truncated, 'token')} to fit")
    return f"{shown(point.prompt, request)}: " + ", ".join([*parts, *_settings(point, request)])


def _settings(point: HistoryPoint, request: ProposalRequest) -> list[str]:
    """What else a stage was trained with, where stages differ: a good rate is no good prompt."""
    if point.kind != "stage":
        return []
    each = [_settings_of(stage) for stage in request.history.stages]
    own = _settings_of(point)
    differing = [n for n in sorted(own) if len({repr(other.get(n)) for other in each}) > 1]
    return [f"{one_line(name)} {_figure(own[name])}" for name in differing]


def _settings_of(stage: HistoryPoint) -> dict[str, Any]:
    reading = {"text prompt": stage.text_prompt} if stage.text_prompt else {}
    return {**stage.params, **reading}


def _figure(value: Any) -> str:
    if isinstance(value, str):
        return quoted(cut(value))
    return f"{value:.3g}" if isinstance(value, float) else one_line(str(value))


def _arrow(before: float | None, after: float) -> str:
    return f"{after:.3f}" if before is None else f"{before:.3f} before training, {after:.3f} after"
