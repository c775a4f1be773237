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
    """Answers with recorded replies.

    Which reply a trial gets follows from the study alone, so that a study that was interrupted
    goes on with the right one.

    Args:
        replies:
            A list of replies, given to the trials that ask an LLM in their order; or the path of
            a JSONL file of ``{"reply": ..., "trial": ...}``, where a row with a trial number
            answers that trial only and rows without are taken in order.
    """

    def __init__(self, replies: Sequence[str] | str | Path) -> None:
        self._source = "list"
        rows: Sequence[dict[str, Any]]
        if isinstance(replies, str | Path):
            self._source = Path(replies).name
            rows = _read(Path(replies))
        else:
            rows = [{"reply": reply} for reply in replies]
        self._in_order = tuple(row["reply"] for row in rows if "trial" not in row)
        self._by_trial = {row["trial"]: row["reply"] for row in rows if "trial" in row}

    @property
    def name(self) -> str:
        return f"replay:{self._source}"

    def complete(self, request: CompletionRequest) -> Completion:
        if request.trial_number in self._by_trial:
            return Completion(self._by_trial[request.trial_number], "replay")
        if request.call_index < len(self._in_order):
            return Completion(self._in_order[request.call_index], "replay")
        raise ProviderError(
            f"no reply is recorded for trial {request.trial_number} "
            f"(request {request.call_index} of the study) in {self._source}"
        )


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
    if not isinstance(row, dict) or not isinstance(row.get("reply"), str):
        raise DataError(f'{path}:{number}: expected {{"reply": "..."}}, got {line[:80]}')
    if not isinstance(row.get("trial", 0), int):
        raise DataError(f'{path}:{number}: "trial" must be a trial number, got {row["trial"]!r}')
    return row
