"""What commands that need the extra ``train`` have in common: their start, and some arguments."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optim_zoo.cli import ending
from optim_zoo.errors import UserError


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a run and one of its saved steps."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a run folder, such as runs/smoke"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="a step that is saved; by default the last one"
    )
    parser.add_argument(
        "--best", action="store_true", help="use the parameters that output.keep_best has kept"
    )
    parser.add_argument(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        help="whether to use the averages that averaging.decay keeps; by default evaluate uses "
        "what the run evaluates, and the other commands the parameters",
    )


def saved_step(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments that choose what to load, from the arguments of `add_run`."""
    return {"step": parsed.step, "best": parsed.best, "averaged": parsed.averaged}


def check_text(*arguments: str) -> None:
    """Checks that arguments are Unicode, as the files of a run folder are written in UTF-8.

    Raises:
      UserError: one has bytes that are not UTF-8.
    """
    for argument in arguments:
        raw = os.fsencode(argument)
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"expected arguments in UTF-8, got {raw!r}; rename the file or the folder"
            ) from error


def find_user_modules() -> None:
    """Lets Python find the user's own tasks and sinks in this folder, as ``python -m`` does."""
    sys.path.append(os.getcwd())


def quiet_orbax() -> None:
    """Silences the tracebacks of Orbax's threads. The main thread raises the same errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


@contextlib.contextmanager
def using_a_run() -> Iterator[None]:
    """Prepares the process to load a run, whose warnings are printed as one line each."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        ending.say(0, ending.line(message))

    quiet_orbax()
    find_user_modules()
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
