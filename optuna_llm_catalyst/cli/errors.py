"""What a user got wrong, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optuna_llm_catalyst.exceptions import CatalystError


INTERRUPTED = 130  # As shells have it: 128 and the signal's number.


class UserError(CatalystError):
    """A mistake in the command or its input; the message says what to do."""


@contextmanager
def user_input() -> Iterator[None]:
    """Within it only the user's values can be wrong: a ``ValueError`` is a mistake of theirs."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
