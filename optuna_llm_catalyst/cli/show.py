"""``show``: what a study holds, from its records alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import optuna
from rich.console import Console

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.studies import load_study


def show(storage: str, study_name: str, *, trial_number: int | None, as_json: bool) -> None:
    """Prints the stages of a study, or one of them in full."""
    study = load_study(storage, study_name)
    rows = report.stage_rows(study)
    console = Console(highlight=False)
    if trial_number is not None:
        story = _story(study, trial_number)
        if as_json:
            report.print_json(story)
        else:
            for line in _story_lines(story):
                console.print(report.printable(line), markup=False, soft_wrap=True)
    elif as_json:
        best = report.chosen(rows)
        document = {
            "study": study.study_name,
            "stages": [asdict(row) for row in rows],
            "chosen": best and best.number,
        }
        report.print_json(document)
    else:
        console.print(report.stage_table(rows))


def _story(study: optuna.Study, number: int) -> dict[str, Any]:
    trials = records.all_trials(study)
    row = next((row for row in report.stage_rows(study) if row.number == number), None)
    if row is None:
        raise UserError(
            f"study {study.study_name!r} has no stage {number}; it has {len(trials)} trials."
        )
    trajectory = records.load_trajectory(trials[number])
    return {
        "stage": asdict(row),
        "params": trials[number].params,
        "user_attrs": trials[number].user_attrs,
        "proposal": records.load(trials[number], "proposal", dict[str, Any]),
        "trajectory": trajectory.to_json() if trajectory else None,
        "mistakes": records.load(trials[number], "mistakes", dict[str, Any]),
    }


def _story_lines(story: dict[str, Any]) -> list[str]:
    stage, proposal = story["stage"], story["proposal"] or {}
    return [
        f"Stage {stage['number']} ({stage['state']}), origin {stage['origin'] or 'unknown'}",
        f"Restart prompt: {stage['prompt']}",
        *_proposal_lines(proposal),
        *(_candidate_line(candidate) for candidate in proposal.get("candidates", ())),
        *_point_lines(story["trajectory"] or {"points": []}),
        *_mistake_lines(story["mistakes"] or {"confusions": []}),
        *(f"{name}: {value}" for name, value in story["user_attrs"].items()),
    ]


def _proposal_lines(proposal: dict[str, Any]) -> list[str]:
    """What the LLM was asked and answered, in the order in which it happened."""
    lines = []
    if "meta_prompt" in proposal:
        seen = proposal.get("history_seen", {})
        lines += [
            f"Asked {proposal.get('provider')} after {seen.get('n_finished')} finished stages, "
            f"with template {proposal.get('template_version')}, about "
            f"{proposal.get('estimated_prompt_tokens')} tokens, {proposal.get('n_points')} "
            f"prompts shown and {proposal.get('n_dropped_points')} left out; sections: "
            f"{', '.join(proposal.get('sections', ()))}",
            *_block("meta-prompt", proposal["meta_prompt"]),
        ]
    for ask in proposal.get("attempts", ()):
        lines += _ask_lines(ask)
    if "edits" in proposal:
        lines.append(
            f"Words changed from the best prompt: {proposal['edits']}, refining ones should "
            f"change at most {proposal['edit_budget']}; beyond it: {proposal['over_budget']}"
        )
    if proposal.get("failure"):
        lines.append(f"The proposal failed, a mutation took its place: {proposal['failure']}")
    if proposal.get("breaker"):
        lines.append(f"Breaker, which spares an LLM that keeps failing: {proposal['breaker']}")
    return lines


def _ask_lines(ask: dict[str, Any]) -> list[str]:
    if "error" in ask:
        return [f"No answer: {ask['error']}"]
    facts = {
        name: ask[name]
        for name in ("model", "digest", "seed", "seconds", "tries", "prompt_tokens")
        + ("reply_tokens", "load_seconds", "options")
        if ask.get(name) is not None
    }
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())]
    lines += _block("reply", ask["reply"])
    lines += [f"  not used: {text!r}: {reason}" for text, reason in ask["rejected"]]
    return lines + ([f"Problem: {ask['problem']}"] if ask["problem"] else [])


def _block(title: str, text: str) -> list[str]:
    return [f"--- {title} ---", text, "---"]


def _candidate_line(candidate: dict[str, Any]) -> str:
    score = candidate["score"]
    shown = "not screened" if score is None else f"loss {score:.3f} without training"
    cut = f", {candidate['n_truncated']} tokens cut off" if candidate["n_truncated"] else ""
    return f"  candidate: {candidate['text']} ({shown}{cut})"


def _point_lines(trajectory: dict[str, Any]) -> list[str]:
    return [
        f"step {point['step']}: loss {_number(point['loss'], '.3f')}, "
        f"accuracy {_number(point['accuracy'], '.1%')}, words: {' '.join(point['words'])}"
        for point in trajectory["points"]
    ]


def _mistake_lines(mistakes: dict[str, Any]) -> list[str]:
    return [
        f"  {label} taken for {predicted}: {count} of {total}"
        for label, predicted, count, total in mistakes["confusions"]
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
