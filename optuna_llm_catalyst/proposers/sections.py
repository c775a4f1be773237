"""The sections of a meta-prompt: each a pure function of the request, empty if it has nothing.

Which of them are sent is one argument, so that what each is worth can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
import json

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.history import HistoryPoint
from optuna_llm_catalyst.prompt_space import RestartPrompt
from optuna_llm_catalyst.proposers import directions
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.pools import edit_budget
from optuna_llm_catalyst.proposers.pools import n_refined


_MAX_EXAMPLE = 200
_MAX_SIGNAL_STAGES = 3
_MAX_SIGNALS = 5
_MAX_CONFUSIONS = 6


@dataclass(frozen=True)
class MetaPromptOptions:
    """What an LLM is told beside the history, and how.

    Attributes:
        task_description: What the frozen model shall do, in the user's words.
        labels: The labels it chooses among.
        examples: Texts of the task with their labels. They leave the training process: to a
            server, and into the study's records. Misread texts are told only beside them.
        sections: Names of the sections to send, of :data:`SECTIONS`; their order is fixed.
        edit_horizon: Stages over which the edit budget of ``pools`` shrinks.
    """

    task_description: str = ""
    labels: Sequence[str] = ()
    examples: Sequence[tuple[str, str]] = ()
    sections: Sequence[str] = ()
    edit_horizon: int = 20


def task(request: ProposalRequest, options: MetaPromptOptions) -> str:
    described = options.task_description.strip() or "(not described)"
    names = ", ".join(map(one_line, options.labels))
    labels = f" The labels are: {names}." if names else ""
    return (
        "You plan restarts for prompt tuning. A short prompt starts a round of gradient descent "
        "on the prompt's embeddings, in front of a frozen language model. Gradient descent only "
        "searches nearby, so where it starts decides how far it gets. You see how earlier starts "
        f"went and choose new ones.\n\nTask of the frozen model: {described}{labels}"
    )


def examples(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Texts of the task; there are none unless the user shares them."""
    lines = [f"- {_quoted(_cut(text))} → {one_line(label)}" for text, label in options.examples]
    return _titled("Examples of the task:", lines)


def mistakes(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """What the best stage gets wrong."""
    best = next(iter(request.history.stages), None)
    if best is None or best.mistakes is None:
        return ""
    lines = [
        f"- {one_line(c.label)} taken for {one_line(c.predicted)}: {c.count} of {c.total}"
        for c in best.mistakes.confusions[:_MAX_CONFUSIONS]
    ]
    # A study may hold texts from when examples were shared.
    shared = best.mistakes.texts if options.examples else ()
    lines += [
        f"- {_quoted(_cut(t.text))} is {one_line(t.label)}, taken for {one_line(t.predicted)}"
        for t in shared
    ]
    return _titled("What the best prompt still gets wrong after training:", lines)


def signals(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Which way training moved the best stages' virtual tokens, and swaps that it measured."""
    known, name = request.space.word_ids, _name(request.history.minimize)
    lines = []
    for point in request.history.stages[:_MAX_SIGNAL_STAGES]:
        drift = [d.word for d in point.drift if d.word in known][:_MAX_SIGNALS]
        swaps = [
            f"{s.old if s.old.isalpha() else _quoted(s.old)} → {s.new} "
            f"({name} {s.measured:+.3f} without training)"
            for s in point.swaps
            if s.new in known and s.old.strip() and s.measured is not None
        ][:_MAX_SIGNALS]
        parts = [f"moved towards {', '.join(drift)}"] if drift else []
        parts += [f"swaps that helped: {', '.join(swaps)}"] if swaps else []
        if parts:
            lines.append(f"- {_shown(point.prompt, request)}: {'; '.join(parts)}")
    title = "Where training moved the best prompts (single words, not wordings to copy):"
    return _titled(title, lines)


def direction_facts(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Which way past stages moved the loss."""
    lines = [f"- {fact}" for fact in directions.facts(request.history, request.space)]
    return _titled("What the finished stages show:", lines)


def ranked_prompts(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """The best prompts, worst first and best last: where a model reads them best, and where an
    over-long prompt is cut last (the paper's order; arXiv 2405.19732)."""
    past = request.history
    if not past.points:
        return "No prompt has been tried yet." if not past.n_finished else "No value is known yet."
    better = f"worst first, best last ({'lower' if past.minimize else 'higher'} is better):"
    lines = {
        trained: [
            _line(point, request) for point in reversed(past.points) if _is_stage(point) is trained
        ]
        for trained in (False, True)
    }
    # A value after training and one without cannot be compared.
    blocks = (
        _titled(f"Prompts that were not trained, {better}", lines[False]),
        _titled(f"Prompts tried so far, {better}", lines[True]),
    )
    return "\n\n".join(filter(None, blocks))


def in_flight(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """What parallel trials try now."""
    lines = [f"- {_shown(prompt, request)}" for prompt in request.history.in_flight]
    return _titled("Being tried right now by other workers, do not repeat:", lines)


def pools(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """One part of the candidates refines the best, within an edit budget, the other explores
    (LEO's two pools, arXiv 2403.02054; GPO's step size, arXiv 2402.17564)."""
    stages = request.history.stages
    if not stages:
        return ""
    n_refining, limit = n_refined(request), edit_budget(request, options.edit_horizon)
    lines = [
        f"- The first {n_refining} should refine the best prompt, "
        f"{_shown(stages[0].prompt, request)}: change at most {limit} of its words."
    ]
    if n_refining < request.n_candidates:
        lines.append(
            f"- The other {request.n_candidates - n_refining} should explore: start from other "
            "ideas than the prompts above."
        )
    return _titled("How far to go:", lines)


def wanted(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """How many prompts of how many tokens, and the form of the answer."""
    length = request.space.num_virtual_tokens
    prompts = "prompt" if request.n_candidates == 1 else "prompts"
    return (
        f"Write {request.n_candidates} new {prompts}. Each is cut at {length} tokens of the "
        f"model's own tokenizer, where a common word is one token and a rare one several, so use "
        f"at most {length} short words. They must differ from each "
        "other and from every prompt above. Keep what the good ones share, and try wordings that "
        "name the task in other ways.\n"
        'Answer with JSON only: {"prompts": ["...", "..."]}'
    )


Section = Callable[[ProposalRequest, MetaPromptOptions], str]

#: All sections in the order in which they are sent.
SECTIONS: dict[str, Section] = {
    "task": task,
    "examples": examples,
    "mistakes": mistakes,
    "signals": signals,
    "directions": direction_facts,
    "ranked_prompts": ranked_prompts,
    "in_flight": in_flight,
    "pools": pools,
    "request": wanted,
}
#: Always sent: without them there is no question.
INSTRUCTIONS = ("task", "request")
#: Ranked history, until an ablation says otherwise: a section has to earn its place.
DEFAULT_SECTIONS = ("task", "examples", "ranked_prompts", "in_flight", "request")


def check_sections(names: Sequence[str]) -> None:
    """Raises a ValueError for what is no list of names of sections."""
    if isinstance(names, str) or not set(names) <= SECTIONS.keys():
        raise ValueError(
            f"`sections` must be a list of names among {', '.join(SECTIONS)}, got {names!r}."
        )


def _is_stage(point: HistoryPoint) -> bool:
    return point.kind == "stage"


def _name(minimize: bool) -> str:
    return "loss" if minimize else "value"


def _titled(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *lines]) if lines else ""


def _line(point: HistoryPoint, request: ProposalRequest) -> str:
    name = _name(request.history.minimize)
    parts = [f"{name} {_arrow(point.before, point.value)}"]
    if not _is_stage(point):
        parts = [f"{name} {point.value:.3f} without training"]
    if point.accuracy is not None:
        parts.append(f"accuracy {_arrow(point.accuracy_before, point.accuracy)}")
    if point.pruned:
        parts.append("stopped early")
    return f"- {_shown(point.prompt, request)}: " + ", ".join(parts)


def _shown(prompt: RestartPrompt, request: ProposalRequest) -> str:
    """A prompt as it may be written again: padding is no word to copy."""
    return _quoted(request.space.without_padding(prompt))


def _quoted(text: str) -> str:
    """One line between quotation marks, whatever tokens or texts it is made of."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_EXAMPLE else text[:_MAX_EXAMPLE] + "…"


def _arrow(before: float | None, after: float) -> str:
    if before is None:
        return f"{after:.3f}"
    return f"{before:.3f} before training, {after:.3f} after"
