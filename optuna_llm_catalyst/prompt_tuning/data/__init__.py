"""Labelled texts: from files, the hub or memory to splits, and draws from them."""

from optuna_llm_catalyst.prompt_tuning.data.draws import draw_splits
from optuna_llm_catalyst.prompt_tuning.data.draws import few_shot
from optuna_llm_catalyst.prompt_tuning.data.loading import load_task
from optuna_llm_catalyst.prompt_tuning.data.memory import task_from_table
from optuna_llm_catalyst.prompt_tuning.data.memory import task_from_texts
from optuna_llm_catalyst.prompt_tuning.data.task import Example
from optuna_llm_catalyst.prompt_tuning.data.task import Task


__all__ = [
    "Example",
    "Task",
    "draw_splits",
    "few_shot",
    "load_task",
    "task_from_table",
    "task_from_texts",
]
