"""The command line: ``optim-zoo train | list | show | verify``.

It parses the arguments, calls the rest of the package, and turns errors into exit codes.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import optim_zoo

USER_ERROR = 2


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
    trains = parsed.command == "train"
    try:
        return _train(parsed.config, parsed.overrides) if trains else _print(parsed)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "optim_zoo" or not trains:
            raise
        advice = "pip install 'optim-zoo[train]' installs what train needs"
        return _say(USER_ERROR, _line(f"{error.name} is missing: {advice}"))
    except (KeyboardInterrupt, OSError) as error:  # `train` handles these once it has started.
        return _say(*_explain(error, trains))


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
    train = commands.add_parser(
        "train",
        help="train what a config describes, or resume such a run",
        description="Trains what a TOML config describes, and writes a run folder with metrics, "
        "plots, checkpoints and report.html. The same command on the same folder resumes the run.",
    )
    train.add_argument("config", type=Path, help="a TOML file, such as configs/smoke.toml")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides a key of the file, such as train.steps=100 or run.dir=runs/trial; "
        "key=unset removes it, so that its default applies",
    )
    commands.add_parser(
        "list",
        help="list the optimizers, and the ports of other libraries' optimizers",
        description="Lists the optimizers with their papers, and the ports by library.",
    )
    show = commands.add_parser(
        "show",
        help="show the formula and the arguments of an optimizer, and what it agrees with",
        description="Shows the formula, the paper and the arguments of an optimizer, and the "
        "recorded trajectories that it reproduces.",
    )
    show.add_argument("name", metavar="NAME", help="such as lamb, torch.AdamW or torch")
    verify = commands.add_parser(
        "verify",
        help="compare optimizers with recorded trajectories on this machine",
        description="Compares optimizers with recorded trajectories of other libraries, on this "
        "machine and its default device, and prints the largest difference from each. The exit "
        "code is 1 if one exceeds its tolerance.",
    )
    verify.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="an optimizer (lamb), a port (torch.AdamW), a library (torch) or a recorded case "
        "(torch_adamw_sched); by default all cases",
    )
    return parser


def _print(parsed: argparse.Namespace) -> int:
    """Runs a command that only prints, and returns the exit code."""
    # Imported lazily: importing jax takes a second.
    from optim_zoo import catalogue, verify
    from optim_zoo.errors import UserError

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        if parsed.command == "verify":
            return 0 if verify.verify(parsed.names) else 1
        if parsed.command == "list":
            print(catalogue.table(columns), flush=True)
        else:
            width = min(columns or catalogue.WIDTH, catalogue.WIDTH)
            print(catalogue.page(parsed.name, width), flush=True)
    except UserError as error:
        return _say(USER_ERROR, _line(error))
    return 0


def _train(path: Path, overrides: Sequence[str]) -> int:
    """Trains, alone or with the other processes of the run; returns the exit code."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.errors import UserError
    from optim_zoo.train import config_file, distributed, loop

    _quiet_orbax()
    sys.path.append(os.getcwd())  # to find the user's own tasks and sinks, as `python -m` does
    notes: list[str] = []
    try:
        _check_text(str(path), *overrides)
        config = config_file.load(path, overrides, notes)
        folder = _run_folder(path, config.run.dir, overrides)
        processes = distributed.start(config.distributed, folder)
    except UserError as error:
        return _say(USER_ERROR, _line(error))
    with processes:
        try:
            return processes.leave(*_ending(lambda: loop.run(config, folder, notes)))
        except (KeyboardInterrupt, OSError) as error:
            return processes.leave(*_explain(error, trains=True))
        except Exception:
            if not processes.joined:
                raise
            traceback.print_exc()
            return processes.leave(1)


def _run_folder(path: Path, configured: str, overrides: Sequence[str]) -> Path:
    """Returns the folder to write to.

    The saved config of a run folder resumes its own run, also after the folder has been moved,
    unless the command line names another folder.
    """
    from optim_zoo.train import saved_config

    own = saved_config.folder_of(path)
    if own is not None and not any(override.startswith("run.dir=") for override in overrides):
        return own
    return Path(configured or Path("runs") / path.stem).expanduser()


def _check_text(*arguments: str) -> None:
    """Checks that arguments are Unicode, as the files of a run folder are written in UTF-8.

    Raises:
      UserError: one has bytes that are not UTF-8.
    """
    from optim_zoo.errors import UserError

    for argument in arguments:
        raw = os.fsencode(argument)
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"expected arguments in UTF-8, got {raw!r}; rename the file or the folder"
            ) from error


def _ending(run: Callable[[], object]) -> tuple[int, str]:
    """Calls a function that trains; returns the exit code and the last line, which may be empty."""
    from optim_zoo.errors import UserError
    from optim_zoo.train import distributed

    try:
        run()
    except UserError as error:
        return USER_ERROR, _line(error)
    except distributed.Stopped as stopped:
        return 128 + stopped.signal_number, _line(stopped) if distributed.is_first() else ""
    except distributed.Lost as lost:
        return distributed.LOST, _line(lost)
    return 0, ""


def _explain(error: KeyboardInterrupt | OSError, trains: bool) -> tuple[int, str]:
    """Returns the exit code and the last line for Ctrl-C, a closed pipe, or a full disk."""
    resumes = "; the same command resumes from what is saved" if trains else ""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, _line(f"interrupted{resumes}")
    _abandon_output()
    if isinstance(error, BrokenPipeError) and not trains:
        return 128 + signal.SIGPIPE, ""  # as in `list | head -1`
    return USER_ERROR, _line(f"{error.strerror or error}{resumes}")


def _line(message: object) -> str:
    return f"optim-zoo: {message}"


def _say(code: int, line: str) -> int:
    """Prints a last line, unless it is empty, and returns the exit code."""
    if line:
        print(line, file=sys.stderr)
    return code


def _abandon_output() -> None:
    """Redirects a closed standard output to nowhere, or Python would print an error at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_orbax() -> None:
    """Silences the tracebacks of Orbax's threads. The main thread raises the same errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    sys.exit(main())
