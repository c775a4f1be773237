"""The sections of a meta-prompt: each a pure function of the request, empty if it has nothing.

Which of them are sent is one argument, so that what each is worth can be measured. No section
speaks of another that is not sent: ``options.sections`` names those that are.
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
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.pools import edit_budget
from optuna_llm_catalyst.proposers.pools import n_refined


_MAX_EXAMPLE = 200
_MAX_SIGNAL_STAGES = 3
_MAX_SIGNALS = 5
_MAX_CONFUSIONS = 6


@dataclass(frozen=True)
class MetaPromptOptions:
    """What an LLM is told beside the history.

    The fields are the arguments of :class:`~optuna_llm_catalyst.LLMProposer` of the same names.
    Misread texts are told only beside ``examples``; the order of ``sections`` does not matter.
    """

    task_description: str = ""
    labels: Sequence[str] = ()
    examples: Sequence[tuple[str, str]] = ()
    mechanism: str = ""
    n_validation: int | None = None
    n_stages: int | None = None
    sections: Sequence[str] = ()
    edit_horizon: int = 20


def task(request: ProposalRequest, options: MetaPromptOptions) -> str:
    described = options.task_description.strip() or "(not described)"
    names = ", ".join(map(one_line, options.labels))
    labels = f" The labels are: {names}." if names else ""
    seen = "see how earlier starts went and choose new ones"
    return (
        "You plan restarts for prompt tuning. A stage starts from a short prompt, in front of a "
        "frozen language model, and improves the prompt's embeddings by gradient descent. That "
        "only searches nearby, so where it starts decides how far it gets. You "
        f"{seen if _ranks(request, options) else 'choose the starts'}.\n\n"
        f"Task of the frozen model: {described}{labels}"
    )


def mechanism(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """What happens with the prompts, and how far their values can be trusted."""
    past, name, n = request.history, _name(request.history.minimize), options.n_validation
    best = f"the {'lowest' if past.minimize else 'highest'} {name} before training"
    trained = f"the one with {best}" if request.screened else "the first"
    left = (options.n_stages or 0) - past.n_finished
    facts = _joined(
        one_line(options.mechanism),
        f"One of your prompts is trained: {trained}." if request.n_candidates > 1 else "",
        f"A stage that finds nothing better keeps its start: its {name} before and after training "
        "are equal."
        if _ranks(request, options)
        else "",
        f"Values rest on {_counted(n, 'validation example')}: small differences are chance."
        if n
        else "",
        f"Stages left, this one included: {left}." if left > 0 else "",
    )
    return f"How it works: {facts}" if facts else ""


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
    for t in shared:
        texts = " / ".join(_quoted(_cut(x)) for x in (t.text, t.text_pair) if x is not None)
        lines.append(f"- {texts} is {one_line(t.label)}, taken for {one_line(t.predicted)}")
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
    # A value after training and one without cannot be compared.
    trained, others = (
        [_line(p, request) for p in reversed(past.points) if (p.kind == "stage") is is_stage]
        for is_stage in (True, False)
    )
    blocks = (
        _titled(f"Prompts that were not trained, {better}", others),
        _titled(f"Prompts tried so far, {better}", trained),
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
        others = request.n_candidates - n_refining
        lines.append(f"- The other {others} should explore: start from quite other ideas.")
    return _titled("How far to go:", lines)


def wanted(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """How many prompts of how many tokens, and the form of the answer."""
    n, length = request.n_candidates, request.space.num_virtual_tokens
    ranks = _ranks(request, options)
    above = ranks or ("in_flight" in options.sections and request.history.in_flight)
    others = ["each other"] * (n > 1) + ["every prompt above"] * bool(above)
    said = _joined(
        f"Write {_counted(n, 'new prompt')}. Each is cut at {_counted(length, 'token')} of the "
        "model's own tokenizer, where a common word is one token and a rare one several, so use "
        f"at most {_counted(length, 'short word')}, and no numbers.",
        f"{'They' if n > 1 else 'It'} must differ from {' and from '.join(others)}."
        if others
        else "",
        "Keep what the good ones share." if ranks else "",
        "Try wordings that name the task in different ways.",
        _fixed(request),
    )
    form = json.dumps({"prompts": reply.examples(n, length)})
    return f"{said}\nAnswer with JSON only, in this form, with prompts of your own: {form}"


Section = Callable[[ProposalRequest, MetaPromptOptions], str]

#: All sections in the order in which they are sent.
SECTIONS: dict[str, Section] = {
    "task": task,
    "mechanism": mechanism,
    "examples": examples,
    "mistakes": mistakes,
    "signals": signals,
    "directions": direction_facts,
    "ranked_prompts": ranked_prompts,
    "in_flight": in_flight,
    "pools": pools,
    "request": wanted,
}
#: Always sent: they say what to do.
INSTRUCTIONS = ("task", "request")
#: Ranked history, until an ablation says otherwise: a section has to earn its place.
DEFAULT_SECTIONS = ("task", "mechanism", "examples", "ranked_prompts", "in_flight", "request")


def check_sections(names: Sequence[str]) -> None:
    """Raises a ValueError for what is no list of names of sections."""
    if isinstance(names, str) or not set(names) <= SECTIONS.keys():
        raise ValueError(
            f"`sections` must be a list of names among {', '.join(SECTIONS)}, got {names!r}."
        )


def _ranks(request: ProposalRequest, options: MetaPromptOptions) -> bool:
    """Whether prompts are shown with their values."""
    return "ranked_prompts" in options.sections and bool(request.history.points)


def _fixed(request: ProposalRequest) -> str:
    """Which words the LLM cannot choose."""
    tokens = sorted(request.fixed.items())
    words = [_quoted(request.space.vocabulary.decode([token_id])) for _, token_id in tokens]
    positions = ", ".join(str(position + 1) for position, _ in tokens)
    return f"The words at positions {positions} are fixed: {', '.join(words)}." if words else ""


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _name(minimize: bool) -> str:
    return "loss" if minimize else "value"


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _titled(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *lines]) if lines else ""


def _line(point: HistoryPoint, request: ProposalRequest) -> str:
    name = _name(request.history.minimize)
    parts = [f"{name} {_arrow(point.before, point.value)}"]
    if point.kind != "stage":
        parts = [f"{name} {point.value:.3f} without training"]
    if point.accuracy is not None:
        parts.append(f"accuracy {_arrow(point.accuracy_before, point.accuracy)}")
    if point.pruned:
        parts.append("stopped early")
    if point.prompt.n_truncated:
        parts.append(f"cut by {_counted(point.prompt.n_truncated, 'token')} to fit")
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
