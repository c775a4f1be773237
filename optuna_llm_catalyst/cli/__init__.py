"""The command line: glue between a user, a study and the package."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``optuna-llm-catalyst``: a user's mistake is one line and exit code 2."""
    try:
        from optuna_llm_catalyst.cli.app import run

        sys.exit(run())
    except ModuleNotFoundError as error:
        print(
            f"error: the command line needs the package {error.name!r}: "
            "pip install 'optuna-llm-catalyst[tuning]'",
            file=sys.stderr,
        )
        sys.exit(2)


__all__ = ["main"]
