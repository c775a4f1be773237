"""The errors of this package.

:class:`ProviderError` and :class:`InvalidReplyError` never leave the sampler: it falls back and
records the reason on the trial.
"""


class CatalystError(Exception):
    """Base class of this package's errors."""


class ProviderError(CatalystError):
    """An LLM could not be reached, or its server reports an error.

    Args:
        message: What happened, in one sentence.
        transient: Whether the same request may succeed a little later.
        status: The HTTP status of a server's error.
        said: What the server wrote with that status.
    """

    def __init__(
        self, message: str, *, transient: bool = False, status: int | None = None, said: str = ""
    ) -> None:
        super().__init__(message)
        self.transient = transient
        self.status = status
        self.said = said


class InvalidReplyError(CatalystError):
    """An LLM's reply holds no usable list of prompts."""


class DataError(CatalystError, ValueError):
    """Labelled texts cannot be used; the message names the file, the line and the fix."""


class ModelNotFoundError(CatalystError, ValueError):
    """A pretrained model is neither a folder, nor cached, nor reachable."""


class ModelError(CatalystError):
    """A model that is asked over a function or a server gives no usable answer."""


class StudyMismatchError(CatalystError, ValueError):
    """A study, or a trial of it, was made for another space, task or set of settings."""


class CheckpointError(CatalystError, ValueError):
    """A trained soft prompt is missing, cannot be loaded, or does not fit the model or task."""


def one_line(text: str) -> str:
    """The text on one line, without control characters and double blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def check_at_least(least: float, **values: float | None) -> None:
    """Raises a ValueError that names an argument below the least that it can be, or NaN."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
