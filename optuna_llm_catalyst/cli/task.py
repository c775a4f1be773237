"""The data of ``tune``: from its options to a task, and what there is to say of it."""

from __future__ import annotations

from pathlib import Path

from optuna_llm_catalyst import prompt_tuning
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning.data.loading import DEMO_FOLDER


#: What a large LLM replied to the demo's own study, recorded once.
DEMO_REPLIES = DEMO_FOLDER.parent / "replies.jsonl"
_MAX_LABELS = 12


def load_task(options: TuneOptions) -> tuple[prompt_tuning.Task, list[str]]:
    """The task that the options name, drawn as they say, and lines about it for the screen."""
    task = prompt_tuning.load_task(
        options.data,
        text=options.text or None,
        text_pair=options.text_pair or None,
        label=options.label or None,
        seed=options.seed,
    )
    if options.shots:
        task = prompt_tuning.few_shot(task, options.shots, options.seed)
    return task, [_sizes(task), *_draw(task, options), *task.notes]


def recorded_replies(options: TuneOptions) -> Path | None:
    """Replies that stand in for an LLM where none answers: there are some for the demo."""
    is_demo = options.data == "demo" and not Path(options.data).is_dir()
    return DEMO_REPLIES if is_demo else None


def described(task: prompt_tuning.Task, options: TuneOptions) -> str:
    """What an LLM is told of the task."""
    given = options.task_description or task.description
    if not given:
        return f"Classify {_called(task)} ({task.name})."
    return f"Images: {given}" if task.of_images else given


def _called(task: prompt_tuning.Task) -> str:
    return "images" if task.of_images else "texts"


def _sizes(task: prompt_tuning.Task) -> str:
    sizes = f"{len(task.train)} {_called(task)} to train, {len(task.validation)} to validate"
    tested = f"{len(task.test)} to test" if task.test else "none to test"
    more = len(task.labels) - _MAX_LABELS
    labels = ", ".join(task.labels[:_MAX_LABELS]) + (f" and {more} more" if more > 0 else "")
    return f"Data {task.name}: {sizes}, {tested}. {len(task.labels)} labels: {labels}."


def _draw(task: prompt_tuning.Task, options: TuneOptions) -> list[str]:
    drawn = [*task.drawn]
    if options.shots:
        rest = [f"the {split} split" for split in drawn if split != "validation"]
        few = f"{options.shots} {_called(task)} of each label to train, as many to validate"
        drawn = [few, *rest]
    how = f"Drawn label by label from the training {_called(task)} (seed {options.seed})"
    return [f"{how}: {', '.join(drawn)}."] if drawn else []
