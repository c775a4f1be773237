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
        "proposal": records.load(trials[number], "proposal"),
        "trajectory": trajectory.to_json() if trajectory else None,
    }


def _story_lines(story: dict[str, Any]) -> list[str]:
    stage = story["stage"]
    proposal = story["proposal"] or {}
    lines = [f"Stage {stage['number']} ({stage['state']}), origin {stage['origin'] or 'unknown'}"]
    lines.append(f"Restart prompt: {stage['prompt']}")
    if proposal.get("failure"):
        lines.append(f"The LLM's proposal failed: {proposal['failure']}")
    for candidate in proposal.get("candidates", ()):
        score = candidate["score"]
        shown = "not screened" if score is None else f"loss {score:.3f} without training"
        lines.append(f"  candidate: {candidate['text']} ({shown})")
    for title in ("meta_prompt", "reply"):
        if proposal.get(title):
            lines += [f"--- {title.replace('_', '-')} ---", proposal[title], "---"]
    for point in (story["trajectory"] or {"points": []})["points"]:
        lines.append(
            f"step {point['step']}: loss {_number(point['loss'], '.3f')}, "
            f"accuracy {_number(point['accuracy'], '.1%')}, words: {' '.join(point['words'])}"
        )
    for name, value in story["user_attrs"].items():
        lines.append(f"{name}: {value}")
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
