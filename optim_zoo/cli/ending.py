"""How a command ends: its last line and its exit code."""

import os
import signal
import sys

USER_ERROR = 2


def line(message: object) -> str:
    """Returns a message as the last line of a command."""
    return f"optim-zoo: {message}"


def say(code: int, last: str) -> int:
    """Prints a last line to standard error, unless it is empty, and returns the exit code."""
    if last:
        print(last, file=sys.stderr)
    return code


def explain(error: KeyboardInterrupt | OSError, *, resumes: bool) -> tuple[int, str]:
    """Returns the exit code and the last line for Ctrl-C, a closed pipe, or a full disk.

    Args:
      error: what was raised.
      resumes: whether the same command resumes from what is saved. Otherwise a closed pipe is no
        error, as in ``optim-zoo list | head -1``.
    """
    advice = "; the same command resumes from what is saved" if resumes else ""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, line(f"interrupted{advice}")
    _abandon_output()
    if isinstance(error, BrokenPipeError) and not resumes:
        return 128 + signal.SIGPIPE, ""
    return USER_ERROR, line(f"{error.strerror or error}{advice}")


def _abandon_output() -> None:
    """Redirects a closed standard output to nowhere, or Python would print an error at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
