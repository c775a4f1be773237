"""The sections of a meta-prompt: each a pure function of the request, empty if it has nothing.

No section speaks of another that is not sent: ``options.sections`` names those that are.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
import json
import math

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.proposers import directions
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.phrases import counted
from optuna_llm_catalyst.proposers.phrases import cut
from optuna_llm_catalyst.proposers.phrases import listed
from optuna_llm_catalyst.proposers.phrases import mistaken
from optuna_llm_catalyst.proposers.phrases import point_line
from optuna_llm_catalyst.proposers.phrases import quoted
from optuna_llm_catalyst.proposers.phrases import shown


_MAX_SIGNAL_STAGES = 3
_MAX_SIGNALS = 5
#: How many of the candidates refine the best prompt, where the section `pools` asks for that.
N_REFINED = 1


@dataclass(frozen=True)
class MetaPromptOptions:
    """What an LLM is told beside the history.

    The fields are the arguments of :class:`~optuna_llm_catalyst.LLMProposer` of the same names.
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
    past, name = request.history, directions.value_name(request.history)
    told = one_line(options.mechanism)
    facts = [told] if told else []
    if request.n_candidates > 1:
        best = f"the {'lowest' if past.minimize else 'highest'} {name} before training"
        trained = f"the one with {best}" if request.screened else "the first"
        facts.append(f"One of your prompts is trained: {trained}.")
    if _ranks(request, options):
        facts.append(
            f"A stage that finds nothing better keeps its start: its {name} before and after "
            "training are equal."
        )
    if options.n_validation:
        n_examples = counted(options.n_validation, "validation example")
        facts.append(f"Values rest on {n_examples}: small differences are chance.")
    left = (options.n_stages or 0) - past.n_finished
    if left > 0:
        facts.append(f"Stages left, this one included: {left}.")
    return f"How it works: {' '.join(facts)}" if facts else ""


def examples(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Texts of the task; there are none unless the user shares them."""
    lines = [f"{quoted(cut(text))} → {one_line(label)}" for text, label in options.examples]
    return listed("Examples of the task:", lines)


def mistakes(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """What the best stage gets wrong."""
    best = next(iter(request.history.stages), None)
    mistakes = best.mistakes if best else None
    # A study may hold texts from when examples were shared.
    lines = mistaken(mistakes, with_texts=bool(options.examples))
    return listed("What the best prompt still gets wrong after training:", lines)


def ensemble(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """How good all stages are together, and what they get wrong together."""
    record = request.history.ensemble
    if record is None:
        return ""
    together = (
        "The classifier is an ensemble: it averages what all trained prompts predict. With "
        f"{counted(record.n_members, 'prompt')} it has {directions.value_name(request.history)} "
        f"{record.loss:.3f}, accuracy {record.accuracy:.3f}. A prompt that repeats a good wording "
        "adds little to it, one that sees what the others miss adds more."
    )
    lines = mistaken(record.mistakes, with_texts=bool(options.examples))
    title = "What the ensemble gets wrong; write prompts that tell these labels apart:"
    return "\n".join(filter(None, [together, listed(title, lines)]))


def signals(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Which way training moved the best stages' virtual tokens, and swaps that it measured."""
    known, name = request.space.word_ids, directions.value_name(request.history)
    lines = []
    for point in request.history.stages[:_MAX_SIGNAL_STAGES]:
        drift = [d.word for d in point.drift if d.word in known][:_MAX_SIGNALS]
        swaps = [
            f"{s.old if s.old.isalpha() else quoted(s.old)} → {s.new} "
            f"({name} {s.measured:+.3f} without training)"
            for s in point.swaps
            if s.new in known and s.old.strip() and s.measured is not None
        ][:_MAX_SIGNALS]
        parts = [f"moved towards {', '.join(drift)}"] if drift else []
        parts += [f"swaps that helped: {', '.join(swaps)}"] if swaps else []
        if parts:
            lines.append(f"{shown(point.prompt, request)}: {'; '.join(parts)}")
    title = "Where training moved the best prompts (single words, not wordings to copy):"
    return listed(title, lines)


def direction_facts(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """Which way past stages moved the loss."""
    facts = directions.facts(request.history, request.space)
    return listed("What the finished stages show:", facts)


def ranked_prompts(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """The best prompts, worst first and best last: where a model reads them best, and where an
    over-long prompt is cut last (the paper's order; arXiv 2405.19732)."""
    past = request.history
    if not past.points:
        return "No prompt has been tried yet." if not past.n_finished else "No value is known yet."
    better = f"worst first, best last ({'lower' if past.minimize else 'higher'} is better):"
    # A value after training and one without cannot be compared.
    untrained = [point for point in past.points if point.kind != "stage"]
    blocks = [
        listed(f"Prompts {which}, {better}", [point_line(p, request) for p in reversed(points)])
        for which, points in (("that were not trained", untrained), ("tried so far", past.stages))
    ]
    return "\n\n".join(filter(None, blocks))


def in_flight(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """What parallel trials try now."""
    lines = [shown(prompt, request) for prompt in request.history.in_flight]
    return listed("Being tried right now by other workers, do not repeat:", lines)


def pools(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """One candidate refines the best prompt, within an edit budget, the others explore
    (LEO's two pools, arXiv 2403.02054; GPO's step size, arXiv 2402.17564). Only one, as stages
    that are alike add little to an ensemble."""
    stages = request.history.stages
    if not stages:
        return ""
    limit = edit_budget(request, options.edit_horizon)
    lines = [
        f"The first should refine the best prompt, {shown(stages[0].prompt, request)}: change at "
        f"most {limit} of its words."
    ]
    n_exploring = request.n_candidates - N_REFINED
    if n_exploring:
        lines.append(
            f"The other {n_exploring} should explore: other wordings and other points of view, "
            "far from the best one and from each other."
        )
    return listed("How far to go:", lines)


def wanted(request: ProposalRequest, options: MetaPromptOptions) -> str:
    """How many prompts of how many tokens, and the form of the answer."""
    n, length = request.n_candidates, request.space.num_virtual_tokens
    ranks = _ranks(request, options)
    sentences = [
        f"Write {counted(n, 'new prompt')}. Each is cut at {counted(length, 'token')} of the "
        "model's own tokenizer, where a common word is one token and a rare one several, so use "
        f"at most {counted(length, 'short word')}, and no numbers."
    ]
    others = ["each other"] if n > 1 else []
    if ranks or ("in_flight" in options.sections and request.history.in_flight):
        others.append("every prompt above")
    if others:
        they = "They" if n > 1 else "It"
        sentences.append(f"{they} must differ from {' and from '.join(others)}.")
    if ranks and not _wants_others(options):
        sentences.append("Keep what the good ones share.")
    sentences.append("Try wordings that name the task in different ways.")
    if not request.history.points:
        sentences.append(
            "Nothing was measured yet, so write from the task alone and take several points of "
            "view: what the text is, what it is about, what its writer wants or feels, how a "
            "reader would sum it up, where it would be filed."
        )
    if request.fixed:
        tokens = sorted(request.fixed.items())
        positions = ", ".join(str(position + 1) for position, _ in tokens)
        words = ", ".join(quoted(request.space.vocabulary.decode([i])) for _, i in tokens)
        sentences.append(f"The words at positions {positions} are fixed: {words}.")
    said, form = " ".join(sentences), json.dumps({"prompts": reply.examples(n, length)})
    return f"{said}\nAnswer with JSON only, in this form, with prompts of your own: {form}"


#: All sections in the order in which they are sent.
SECTIONS: dict[str, Callable[[ProposalRequest, MetaPromptOptions], str]] = {
    "task": task,
    "mechanism": mechanism,
    "examples": examples,
    "mistakes": mistakes,
    "signals": signals,
    "directions": direction_facts,
    "ensemble": ensemble,
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
    """Raises a ValueError unless ``names`` is a list of section names."""
    if isinstance(names, str) or not set(names) <= SECTIONS.keys():
        known = ", ".join(SECTIONS)
        raise ValueError(f"`sections` must be a list of names among {known}, got {names!r}.")


def edit_budget(request: ProposalRequest, horizon: int) -> int:
    """Words of the best prompt to change: by a cosine over the horizon, from all to a fifth."""
    init = request.space.num_virtual_tokens
    final = max(1, init // 5)
    progress = min(request.history.n_finished / horizon, 1.0)
    return int(final + (init - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def _wants_others(options: MetaPromptOptions) -> bool:
    """Whether a section asks for prompts unlike the best ones."""
    return not {"ensemble", "pools"}.isdisjoint(options.sections)


def _ranks(request: ProposalRequest, options: MetaPromptOptions) -> bool:
    """Whether prompts are shown with their values."""
    return "ranked_prompts" in options.sections and bool(request.history.points)
