"""Recorded replies instead of an LLM: for tests, and to repeat a study without its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path

from optuna_llm_catalyst.exceptions import DataError
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.schema import decode


@dataclass(frozen=True)
class _Row:
    """A reply or an error, of an attempt of a trial or the next in order."""

    reply: str | None = None
    error: str | None = None
    model: str = "replay"
    problem: str = ""
    trial: int | None = None
    attempt: int = 0

    def __post_init__(self) -> None:
        if self.reply is self.error is None:
            raise ValueError('expected {"reply": "..."} or {"error": "..."}')


class ReplayProvider:
    """Answers with recorded replies, and fails where the recorded LLM failed.

    Which reply a trial gets follows from the study alone: one that was interrupted goes on with
    the right one.

    Args:
        replies: A list of replies, one for each trial with a request, in their order; or the path
            of a JSONL file of rows ``{"reply": ...}``, taken in order, or
            ``{"trial": 4, "attempt": 0, "reply": ...}``, as ``export --replies`` writes them.
            ``{"error": ...}`` in place of the reply fails.
    """

    def __init__(self, replies: Sequence[str] | str | Path) -> None:
        if isinstance(replies, str | Path):
            self._source = Path(replies).name
            rows = _read(Path(replies))
        else:
            self._source = "list"
            rows = [_Row(reply) for reply in replies]
        self._in_order = [row for row in rows if row.trial is None]
        self._by_trial = {(row.trial, row.attempt): row for row in rows if row.trial is not None}

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
        if row.error is not None:
            raise ProviderError(row.error)
        return Completion(row.reply or "", row.model, row.problem)


def _read(path: Path) -> list[_Row]:
    try:
        # Some editors begin a file with a byte order mark. Only a line feed ends a row:
        # `splitlines` would also cut at U+2028 within a reply.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: recorded replies cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(decode(_Row, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}, in {line[:80]}") from error
    return rows
