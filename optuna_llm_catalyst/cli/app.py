"""The commands; an error of theirs is one line and exit code 2."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
import inspect
import os
import signal
import sys
import traceback
from typing import Annotated
from typing import Any
from typing import get_type_hints
import warnings

import optuna
import typer

from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import options
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.interrupts import between_storage_calls
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.exceptions import first_line


_DISTILLED = "optuna_llm_catalyst.prompt_tuning.stages.distilled"
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prompt tuning on a frozen model, restarted by an LLM, inside Optuna.",
)


def run() -> int:
    """Runs the command line and returns the exit code."""
    # What matters of Optuna's warnings the commands say themselves, without tracebacks; of the
    # package's own log the records that cannot be read are said nowhere else.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.get_logger(f"optuna.{records.__name__}").setLevel(optuna.logging.WARNING)
    # Nothing else says that a student was left out. Its module would import torch.
    optuna.logging.get_logger(f"optuna.{_DISTILLED}").setLevel(optuna.logging.INFO)
    with output.guarded(), between_storage_calls(), warnings.catch_warnings():
        # An enqueued prompt with a wrong token id is an error of ours, in one line.
        warnings.filterwarnings("ignore", message="Fixed parameter")
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
    # By a ValueError the package names a wrong value and the fix.
    if isinstance(error, CatalystError) or type(error) is ValueError:
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)[:200]}: {error.strerror}"
    return f"{type(error).__name__}: {first_line(error)} (LLM_CATALYST_DEBUG=1 says where)"


def _add(name: str, kind: type[Any]) -> None:
    """Adds the command of a module, whose options are the fields of a dataclass."""

    def call(**values: Any) -> int:
        output.hide(values.get("llm_api_key"))
        _check_texts(values)
        try:
            # Here, as some of the modules import torch.
            module: Any = import_module(f"optuna_llm_catalyst.cli.{name.replace('-', '_')}")
            return module.run(kind(**values)) or 0
        except KeyboardInterrupt:
            output.say("Interrupted.")
            return 128 + signal.SIGINT

    hints, known = get_type_hints(kind), inspect.signature(kind).parameters
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            known[f.name].replace(annotation=Annotated[hints[f.name], f.metadata["typer"]])
            for f in fields(kind)
        ]
    )
    app.command(name, help=kind.__doc__)(call)


def _check_texts(values: dict[str, Any]) -> None:
    """Refuses bytes that are not UTF-8, which no storage and no tokenizer takes."""
    for name, value in values.items():
        try:
            "".join(value if isinstance(value, str | list) else ()).encode()
        except UnicodeEncodeError as error:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise output.UserError(
                f"{option} must be UTF-8 text, its character {error.start + 1} is none."
            ) from error


_add("tune", TuneOptions)
_add("show", options.ShowOptions)
_add("meta-prompt", options.MetaPromptCommand)
_add("export", options.ExportOptions)
_add("predict", options.PredictOptions)
_add("doctor", options.DoctorOptions)
