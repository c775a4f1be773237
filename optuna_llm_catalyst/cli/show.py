"""``show``: what a study holds, from its records alone."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.options import ShowOptions
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.mistakes import Mistakes
from optuna_llm_catalyst.trajectory import Trajectory


#: A reply that ran on says no more in full.
_MAX_REPLY = 2_000


@dataclass(frozen=True)
class Candidate:
    """One candidate of a proposal's record."""

    text: str
    score: float | None = None
    n_truncated: int = 0


@dataclass(frozen=True)
class Attempt:
    """One attempt of a proposal's record: an error, or a reply and what was made of it."""

    error: str | None = None
    reply: str = ""
    problem: str = ""
    server_problem: str = ""
    rejected: tuple[tuple[str, str], ...] = ()
    model: str | None = None
    digest: str | None = None
    seed: int | None = None
    seconds: float | None = None
    tries: int | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    load_seconds: float | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class ProposalRecord:
    """How a restart prompt came about, as the sampler recorded it."""

    provider: str = ""
    meta_prompt: str | None = None
    template_version: Any = None
    estimated_prompt_tokens: int | None = None
    n_points: int | None = None
    n_dropped_points: int | None = None
    sections: tuple[str, ...] = ()
    history_seen: dict[str, Any] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    edits: Any = None
    edit_budget: Any = None
    over_budget: Any = None
    failure: str | None = None
    breaker: str | None = None


def run(options: ShowOptions) -> int:
    """Prints the stages of a study, or one of them in full."""
    study = load_study(options.storage, options.study_name)
    rows = report.stage_rows(study)
    if options.trial is not None:
        _show_stage(study, rows, options.trial, as_json=options.json)
    elif options.json:
        best = report.chosen(rows)
        document = {
            "study": study.study_name,
            "stages": [asdict(row) for row in rows],
            "chosen": best and best.number,
        }
        output.print_json(document)
    else:
        report.print_stages(rows)
    return 0


def _show_stage(
    study: optuna.Study, rows: Sequence[report.StageRow], number: int, *, as_json: bool
) -> None:
    row = next((row for row in rows if row.number == number), None)
    if row is None:
        raise UserError(f"study {study.study_name!r} has no stage {number}; it has {len(rows)}.")
    trial = records.all_trials(study)[number]
    trajectory, mistakes = records.load_trajectory(trial), records.load_mistakes(trial)
    if not as_json:
        for line in _story(row, trial, trajectory, mistakes):
            output.tell(line)
        return
    document = {
        "stage": asdict(row),
        "params": trial.params,
        "user_attrs": trial.user_attrs,
        "proposal": records.load(trial, "proposal", dict[str, Any]),
        "trajectory": trajectory.to_json() if trajectory else None,
        "mistakes": records.load(trial, "mistakes", dict[str, Any]),
    }
    output.print_json(document)


def _story(
    row: report.StageRow,
    trial: FrozenTrial,
    trajectory: Trajectory | None,
    mistakes: Mistakes | None,
) -> Iterator[str]:
    yield f"Stage {row.number} ({row.state}), origin {row.origin or 'unknown'}"
    yield f"Restart prompt: {row.prompt}"
    if row.settings:
        yield f"Settings: {report.listed(row.settings)}"
    proposal = records.load(trial, "proposal", ProposalRecord)
    if proposal is not None:
        yield from _proposal_lines(proposal)
    elif f"{records.PREFIX}proposal" in trial.system_attrs:
        yield "The record of its proposal cannot be read: it was changed or broke off."
    for point in trajectory.points if trajectory else ():
        yield (
            f"step {point.step}: loss {_number(point.loss, '.3f')}, "
            f"accuracy {_number(point.accuracy, '.1%')}, words: {point.text}"
        )
    for c in mistakes.confusions if mistakes else ():
        yield f"  {c.label} taken for {c.predicted}: {c.count} of {c.total}"
    for name, value in trial.user_attrs.items():
        yield f"{name}: {value}"


def _proposal_lines(proposal: ProposalRecord) -> Iterator[str]:
    """What the LLM was told and replied, in the order in which it happened."""
    if proposal.meta_prompt is not None:
        yield (
            f"Requested of {proposal.provider} after {proposal.history_seen.get('n_finished')} "
            f"finished stages, with template {proposal.template_version}, about "
            f"{proposal.estimated_prompt_tokens} tokens, {proposal.n_points} prompts shown and "
            f"{proposal.n_dropped_points} left out; sections: {', '.join(proposal.sections)}"
        )
        yield from _block("meta-prompt", proposal.meta_prompt)
    for attempt in proposal.attempts:
        yield from _attempt_lines(attempt)
    if proposal.edits is not None:
        yield (
            f"Words changed from the best prompt: {proposal.edits}, refining ones should change "
            f"at most {proposal.edit_budget}; beyond it: {proposal.over_budget}"
        )
    if proposal.failure:
        yield f"The proposal failed, a mutation took its place: {proposal.failure}"
    if proposal.breaker:
        yield f"Breaker, which spares an LLM that keeps failing: {proposal.breaker}"
    for candidate in proposal.candidates:
        yield _candidate_line(candidate)


def _attempt_lines(attempt: Attempt) -> Iterator[str]:
    if attempt.error is not None:
        yield f"No reply: {attempt.error}"
        return
    told = ("error", "reply", "problem", "server_problem", "rejected")
    facts = {
        name: value
        for name, value in asdict(attempt).items()
        if name not in told and value is not None
    }
    yield report.listed(facts)
    yield from _block("reply", records.clip(attempt.reply, _MAX_REPLY))
    for text, reason in attempt.rejected:
        yield f"  not used: {records.clip(text, _MAX_REPLY)!r}: {reason}"
    if attempt.problem:
        yield f"Problem: {attempt.problem}"


def _block(title: str, text: str) -> list[str]:
    return [f"--- {title} ---", text, "---"]


def _candidate_line(candidate: Candidate) -> str:
    score = candidate.score
    shown = "not screened" if score is None else f"loss {score:.3f} without training"
    cut = f", {candidate.n_truncated} tokens cut off" if candidate.n_truncated else ""
    return f"  candidate: {candidate.text} ({shown}{cut})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
