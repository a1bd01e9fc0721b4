"""The command line: ``optim-zoo COMMAND``, one module per command.

It parses the arguments, calls the rest of the package, and turns errors into exit codes. A command
is a module with two functions: ``add(commands)`` adds its parser, whose default ``run`` is the
second one, and ``run(parsed)`` runs it and returns its exit code. It may raise `UserError`.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import optim_zoo
from optim_zoo.cli import (
    ending,
    evaluate,
    export,
    listing,
    lr_find,
    predict,
    report,
    reproduce,
    show,
    sweep,
    train,
    verify,
)
from optim_zoo.errors import UserError

# In the order of the help.
_COMMANDS = (
    train,
    evaluate,
    predict,
    export,
    listing,
    show,
    verify,
    sweep,
    report,
    lr_find,
    reproduce,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      arguments: the arguments of the command line; those of this process by default.

    Returns:
      0 for success, 1 if `verify` finds a difference, 2 for a user's mistake, 75 if another process
      of the run is lost, and 128 + n for signal n.
    """
    if arguments is None:
        _use_utf8()
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except UserError as error:
        return ending.say(ending.USER_ERROR, ending.line(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "optim_zoo":
            raise
        advice = f"pip install 'optim-zoo[train]' installs what {parsed.command} needs"
        return ending.say(ending.USER_ERROR, ending.line(f"{error.name} is missing: {advice}"))
    except (KeyboardInterrupt, OSError) as error:  # `train` handles these once it has started.
        return ending.say(*ending.explain(error, resumes=parsed.command == "train"))
    return code


def _use_utf8() -> None:
    """Starts Python again in its UTF-8 mode where file names would have to be ASCII.

    This is the case under ``LC_ALL=C PYTHONUTF8=0``: Python could not open ``text/ä.txt`` there.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optim-zoo", description="Large-batch training in JAX whose optimizer you can trust."
    )
    parser.add_argument("--version", action="version", version=f"optim-zoo {optim_zoo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
