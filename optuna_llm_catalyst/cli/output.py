"""All that the commands print passes through here.

:class:`_Guarded` stands in for both of Python's streams and masks secrets; :func:`printable`
removes what a terminal would obey, line by line.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import redirect_stderr
from contextlib import redirect_stdout
import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
from typing import Any
from typing import TextIO
from urllib.parse import quote
from urllib.parse import unquote

import optuna
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.schema import encode


#: Shorter secrets are not masked: too many lines would hold them by chance.
_MIN_SECRET = 4
_USERINFO = re.compile(r"""(\w://)[^\s/@"']*(?::[^\s@"']*)?@""")
_SECRET_PARAMETER = r"([?&][\w.-]*(?:password|passwd|secret|token|key)[\w.-]*=)"
_QUERY = re.compile(rf"""{_SECRET_PARAMETER}[^&\s"']+""", re.IGNORECASE)
_QUERY_VALUE = re.compile(rf"{_SECRET_PARAMETER}([^&]+)", re.IGNORECASE)
#: The credentials of a URL as an option gives them, up to the last at sign.
_CREDENTIALS = re.compile(r"[\w+.-]+://(?!/)((?:[^:]*:)?(.*))@", re.DOTALL)
#: Variables that are named like secrets may hold a number or a switch.
_SECRET_VALUE = re.compile(r"(?=.*[^\d.+-]).{8,}", re.DOTALL)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|PASSWORD|PASSWD|SECRET)$", re.IGNORECASE)
#: For streams that are not UTF-8; one character each, so that tables stay aligned.
_PLAIN = str.maketrans("→–…�", ">-.?")
_secrets: set[str] = set()
#: The ways in which a message or a line for a shell may write a secret.
_QUOTED: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: quote(text, safe="", errors="surrogateescape"),
    lambda text: repr(text)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: shlex.quote(f"{text} ")[1:-2],
)


class UserError(CatalystError):
    """A mistake in the command or its input; the message says what to do."""


def hide(*texts: str | None) -> None:
    """Masks these texts, plain or quoted, in all that is printed until the command ends."""
    for text in texts:
        if text and len(text) >= _MIN_SECRET:
            plain = {text, unquote(text)}
            _secrets.update(form(each) for each in plain for form in _QUOTED)


def hide_credentials(url: str) -> None:
    """Masks the user and the password of a URL, if it has any."""
    if found := _CREDENTIALS.search(url):
        hide(*found.groups())
    hide(*(value for _, value in _QUERY_VALUE.findall(url)))


def mask(text: str) -> str:
    """The text without the secrets that are known, and without the credentials of any URL."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return _QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def printable(text: str) -> str:
    """The text without secrets and without what a terminal would obey.

    An LLM or a server may have written it. Secrets go first: a table would cut them in pieces.
    """
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in mask(text))


def say(line: str) -> None:
    """Prints a message to stderr, so that stdout is the report alone."""
    print(printable(line), file=sys.stderr, flush=True)


def report(document: Any, parts: Iterable[str | Table], *, as_json: bool) -> None:
    """Prints the report to stdout: one JSON document, or lines and tables."""
    if as_json:
        # Numbers that JSON does not know become null.
        print(json.dumps(_masked(encode(document)), allow_nan=False))
        return
    for part in parts:
        if isinstance(part, str):
            print(printable(part))
        else:
            Console(highlight=False, width=width()).print(part)


def _masked(value: Any) -> Any:
    """A JSON value without secrets in its texts: in a document they are written in another way."""
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return mask(value) if isinstance(value, str) else value


def cell(text: str) -> Text:
    """A text for a table, which would read a plain one as markup."""
    return Text(printable(text))


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size().columns


@contextmanager
def guarded() -> Iterator[None]:
    """Within it stdout and stderr mask secrets and survive what they cannot encode or write."""
    _secrets.clear()
    hide(
        *(
            v
            for k, v in os.environ.items()
            if _SECRET_VARIABLE.search(k) and _SECRET_VALUE.match(v)
        )
    )
    for argument in sys.argv:
        hide_credentials(argument)
    host = os.environ.get("OLLAMA_HOST", "")
    hide_credentials(host if "://" in host else f"http://{host}")
    out, err = _Guarded(sys.stdout, is_report=True), _Guarded(sys.stderr, is_report=False)
    with redirect_stdout(out), redirect_stderr(err), _log_to_stderr():
        yield


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Within it Optuna's log goes through :func:`say`; its own handler keeps an older stream."""
    handler, logger = _Say(), logging.getLogger("optuna")
    optuna.logging.disable_default_handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        optuna.logging.enable_default_handler()


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


class _Guarded:
    """A text stream that masks secrets; all else it leaves to the stream behind it.

    What cannot be written of a report is an error; a lost message must not stop a stage.
    """

    def __init__(self, stream: TextIO, *, is_report: bool) -> None:
        self._stream = stream
        self._is_report = is_report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        text, encoding = mask(text), self._stream.encoding or "utf-8"
        if not encoding.lower().startswith("utf"):
            text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            # What is still buffered would fail once more when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._is_report:
                return
            if error.errno == errno.EPIPE:
                sys.exit(1)  # Whoever read has seen enough, as in `show | head`.
            raise UserError(f"the report cannot be written: {error.strerror}.") from error
