"""Recorded replies instead of an LLM: for tests, and to repeat a study without its model."""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest


class ReplayProvider:
    """Answers with recorded replies, and fails where the recorded LLM failed.

    Which reply a trial gets follows from the study alone, so that a study that was interrupted
    goes on with the right one.

    Args:
        replies:
            A list of replies, one for each trial that asks, in their order; or the path of a
            JSONL file of rows ``{"reply": ...}``, taken in order, or
            ``{"trial": 4, "attempt": 0, "reply": ...}`` for that attempt of that trial, as
            ``export --replies`` writes them. ``{"error": ...}`` in place of the reply fails.
    """

    def __init__(self, replies: Sequence[str] | str | Path) -> None:
        self._source = "list"
        rows: Sequence[dict[str, Any]]
        if isinstance(replies, str | Path):
            self._source = Path(replies).name
            rows = _read(Path(replies))
        else:
            rows = [{"reply": reply} for reply in replies]
        self._in_order = tuple(row for row in rows if "trial" not in row)
        self._by_trial = {(r["trial"], r.get("attempt", 0)): r for r in rows if "trial" in r}

    @property
    def name(self) -> str:
        return f"replay:{self._source}"

    @property
    def max_prompt_tokens(self) -> None:
        return None

    def complete(self, request: CompletionRequest) -> Completion:
        row = self._by_trial.get((request.trial_number, request.attempt))
        # In a list there is one reply a trial: its later attempts have none.
        if row is None and request.attempt == 0 and request.proposal_index < len(self._in_order):
            row = self._in_order[request.proposal_index]
        if row is None:
            raise ProviderError(
                f"{self._source} has no reply to attempt {request.attempt} of trial "
                f"{request.trial_number}, which is the study's request {request.proposal_index}"
            )
        if "error" in row:
            raise ProviderError(row["error"])
        return Completion(row["reply"], row.get("model", "replay"), row.get("problem", ""))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # Only a line feed ends a row: `splitlines` would also cut at U+2028 within a reply.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: recorded replies cannot be read: {error}") from error
    return [_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict) or not {"reply", "error"} & row.keys():
        raise DataError(f'{path}:{number}: expected {{"reply": "..."}}, got {line[:80]}')
    for key, kind, name in (
        ("reply", str, "a text"),
        ("error", str, "a text"),
        ("problem", str, "a text"),
        ("model", str, "a text"),
        ("trial", int, "a trial number"),
        ("attempt", int, "a number"),
    ):
        if key in row and not isinstance(row[key], kind):
            raise DataError(f'{path}:{number}: "{key}" must be {name}, got {row[key]!r}')
    return row
