"""The command line: glue between a user, a study and the package."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of ``optuna-llm-catalyst``: a user's mistake is one line and exit code 2."""
    code = 2
    try:
        from optuna_llm_catalyst.cli.app import run

        code = run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 128 + signal.SIGINT  # As shells have it.
    except ModuleNotFoundError as error:
        print(
            f"error: the command line needs the package {error.name!r}: "
            "pip install 'optuna-llm-catalyst[tuning]'",
            file=sys.stderr,
        )
    except (ImportError, MemoryError) as error:
        print(f"error: the command line cannot start: {error!r}", file=sys.stderr)
    sys.exit(code)


__all__ = ["main"]
