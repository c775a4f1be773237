"""The commands, and what becomes of their errors: one line and exit code 2."""

from __future__ import annotations

from dataclasses import Field
from dataclasses import fields
from dataclasses import MISSING
from importlib import import_module
import inspect
import os
import sys
import traceback
from typing import Annotated
from typing import Any
from typing import get_type_hints

import optuna
import typer

from optuna_llm_catalyst.cli import options
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.errors import INTERRUPTED
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import first_line


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prompt tuning on a frozen model, restarted by an LLM, inside Optuna.",
)


def run() -> int:
    """Runs the command line and returns the exit code."""
    # What matters of Optuna's warnings the commands say themselves, without tracebacks.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with output.guarded():
        try:
            code: int = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            sys.stdout.flush()
        except ModuleNotFoundError:
            raise  # The entry point says what to install.
        except Exception as error:
            if os.environ.get("LLM_CATALYST_DEBUG"):
                traceback.print_exc()
            output.say(f"error: {_message(error)}")
            code = 2
        return code


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):  # What typer says of the options.
        return f"{error.format_message()} (--help lists the options)"
    if isinstance(error, CatalystError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)[:200]}: {error.strerror}"
    return f"{type(error).__name__}: {first_line(error)} (LLM_CATALYST_DEBUG=1 says where)"


def _add(name: str, kind: type[Any]) -> None:
    """Adds the command of a module, whose options are the fields of a dataclass."""

    def call(**values: Any) -> None:
        _check_texts(values)
        output.hide(values.get("llm_api_key"))
        try:
            # Here, as some of the modules import torch.
            module = import_module(f"optuna_llm_catalyst.cli.{name.replace('-', '_')}")
            code = module.run(kind(**values))
        except KeyboardInterrupt:
            output.say("Interrupted.")
            code = INTERRUPTED
        raise typer.Exit(code)

    hints = get_type_hints(kind)
    parameters = [_parameter(f, hints[f.name]) for f in fields(kind)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=kind.__doc__)(call)


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    """A field as typer reads it."""
    facts = dict(field.metadata)
    if facts.pop("is_argument", False):
        declared = typer.Argument(**facts)
    else:
        # A flag that is given a name has no `--no-…` beside it.
        flag = (f"--{field.name.replace('_', '-')}",) if kind is bool else ()
        declared = typer.Option(*flag, **facts)
    default = [] if field.default is MISSING else field.default
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, declared],
    )


def _check_texts(values: dict[str, Any]) -> None:
    """Refuses bytes that are not UTF-8, which no storage and no tokenizer takes."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    option = name.upper() if name == "data" else f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} must be UTF-8 text, got {text!r}.") from error


_add("tune", options.TuneOptions)
_add("show", options.ShowOptions)
_add("meta-prompt", options.MetaPromptCommand)
_add("export", options.ExportOptions)
_add("doctor", options.DoctorOptions)
