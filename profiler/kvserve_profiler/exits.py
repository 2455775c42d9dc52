"""How errors become exit codes, and a run's last words."""

import os
from pathlib import Path
from typing import Final

from kvserve_api.errors import InfeasibleError, KVServeError, SpecError, UnsupportedError
from kvserve_api.names import ExitCode

MAX_MESSAGE: Final = 1000
"""Characters; a progress message may have 1,024, a termination message 4,096 bytes."""


def exit_code(error: Exception) -> ExitCode:
    """Return the exit code for an error."""
    match error:
        case SpecError():
            return ExitCode.BAD_INPUT
        case InfeasibleError():
            return ExitCode.INFEASIBLE
        case UnsupportedError():
            return ExitCode.UNSUPPORTED
        case _:
            return ExitCode.FAILED


def last_words(error: Exception) -> str:
    """Return an error in one line, cut to a bounded length."""
    reason = error.reason if isinstance(error, KVServeError) else type(error).__name__
    return f"{reason}: {' '.join(str(error).split())}"[:MAX_MESSAGE]


def leave_message(path: Path, message: str) -> None:
    """Write a container's termination message; outside a container there is no such file, and none is made."""
    if path.is_file() and os.access(path, os.W_OK):
        path.write_text(message, encoding="utf-8")
