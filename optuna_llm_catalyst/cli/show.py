"""``show``: what a study holds, from its records alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from optuna.trial import FrozenTrial

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.options import ShowOptions
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.mistakes import EnsembleRecord


#: Longer replies are clipped.
_MAX_REPLY = 2_000


@dataclass(frozen=True)
class Candidate:
    """One candidate of a proposal's record."""

    text: str
    score: float | None = None
    n_truncated: int = 0


@dataclass(frozen=True)
class Attempt:
    """One attempt of a proposal's record: an error, or a reply and what was made of it.

    Providers add facts of their own.
    """

    error: str | None = None
    reply: str = ""
    problem: str = ""
    server_problem: str = ""
    rejected: tuple[tuple[str, str], ...] = ()
    model: str | None = None


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


def run(options: ShowOptions) -> None:
    """Prints the stages of a study, or one of them in full."""
    study = load_study(options.storage, options.study_name)
    if options.trial is None:
        rows = report.stage_rows(study)
        output.report(report.document(study, rows), report.stages(rows), as_json=options.json)
        return
    row = report.stage_row(study, options.trial)
    trial = records.all_trials(study)[row.number]
    document = {
        "stage": row,
        "params": trial.params,
        "user_attrs": trial.user_attrs,
        "proposal": records.load(trial, "proposal", dict),
        "trajectory": records.load_trajectory(trial),
        "mistakes": records.load(trial, "mistakes", dict),
        "ensemble": records.load(trial, "ensemble", dict),
    }
    output.report(document, _story(row, trial), as_json=options.json)


def _story(row: report.StageRow, trial: FrozenTrial) -> Iterator[str]:
    yield f"Stage {row.number} ({row.state}), origin {row.origin or 'unknown'}"
    yield f"Restart prompt: {row.prompt}"
    if row.text_prompt:
        yield f"Text prompt: {row.text_prompt}"
    if row.settings:
        yield f"Settings: {report.listed(row.settings)}"
    proposal = records.load(trial, "proposal", ProposalRecord)
    if proposal is not None:
        record = records.load(trial, "proposal", dict) or {}
        yield from _proposal_lines(proposal, record, row.metric)
    elif f"{records.PREFIX}proposal" in trial.system_attrs:
        yield "The record of its proposal cannot be read: it was changed or broke off."
    trajectory, mistakes = records.load_trajectory(trial), records.load_mistakes(trial)
    for point in trajectory.points if trajectory else ():
        best = trial.intermediate_values.get(point.step)
        yield (
            f"step {point.step}: loss {report.figure(point.loss, '.3f')}, "
            f"accuracy {report.figure(point.accuracy, '.1%')}, best {row.metric} so far "
            f"{report.told(row.metric, best)}, words: {point.text}"
        )
    for c in mistakes.confusions if mistakes else ():
        yield f"  {c.label} taken for {c.predicted}: {c.count} of {c.total}"
    ensemble = records.load_ensemble(trial)
    if ensemble is not None:
        yield (
            f"Ensemble so far, with this stage: {ensemble.n_members} members, validation "
            f"{_ensemble_told(ensemble, row.metric)}"
        )
    for name, value in trial.user_attrs.items():
        yield f"{name}: {value}"


def _ensemble_told(ensemble: EnsembleRecord, metric: str) -> str:
    figures = {metric: ensemble.value, "loss": ensemble.loss, "accuracy": ensemble.accuracy}
    return ", ".join(f"{name} {report.told(name, value)}" for name, value in figures.items())


def _proposal_lines(
    proposal: ProposalRecord, record: dict[str, Any], metric: str
) -> Iterator[str]:
    """What the LLM was told and replied, in the order in which it happened."""
    if proposal.meta_prompt is not None:
        yield (
            f"Requested of {proposal.provider} after {proposal.history_seen.get('n_finished')} "
            f"finished stages, with template {proposal.template_version}, about "
            f"{proposal.estimated_prompt_tokens} tokens, {proposal.n_points} prompts shown and "
            f"{proposal.n_dropped_points} left out; sections: {', '.join(proposal.sections)}"
        )
        yield f"--- meta-prompt ---\n{proposal.meta_prompt}\n---"
    for attempt, facts in zip(proposal.attempts, record.get("attempts", ()), strict=True):
        yield from _attempt_lines(attempt, facts)
    if proposal.edits is not None:
        yield (
            f"Words changed from the best prompt: {proposal.edits}, refining ones should change "
            f"at most {proposal.edit_budget}; beyond it: {proposal.over_budget}"
        )
    if proposal.failure:
        yield f"The proposal failed, another start took its place: {proposal.failure}"
    if proposal.breaker:
        yield f"Breaker, which spares an LLM that keeps failing: {proposal.breaker}"
    for c in proposal.candidates:
        score = "not screened"
        if c.score is not None:
            score = f"{metric} {report.told(metric, c.score)} without training"
        cut = f", {c.n_truncated} tokens cut off" if c.n_truncated else ""
        yield f"  candidate: {c.text} ({score}{cut})"


def _attempt_lines(attempt: Attempt, facts: dict[str, Any]) -> Iterator[str]:
    if attempt.error is not None:
        yield f"No reply: {attempt.error}"
        return
    told = ("error", "reply", "problem", "server_problem", "rejected")
    yield report.listed({k: v for k, v in facts.items() if k not in told and v is not None})
    yield f"--- reply ---\n{records.clip(attempt.reply, _MAX_REPLY)}\n---"
    for text, reason in attempt.rejected:
        yield f"  not used: {records.clip(text, _MAX_REPLY)!r}: {reason}"
    if attempt.problem:
        yield f"Problem: {attempt.problem}"
