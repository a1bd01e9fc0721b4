"""The command line: ``optim-zoo train | list | show | verify``. Parses and calls."""

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

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    It is 0 for success, 1 if `verify` finds a difference, 2 for a user's mistake, 75 if another
    process of the run is lost, and 128 + n for signal n.
    """
    parsed = _parser().parse_args(arguments)
    trains = parsed.command == "train"
    try:
        return _train(parsed.config, parsed.overrides) if trains else _look(parsed)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "optim_zoo" or not trains:
            raise
        advice = "pip install 'optim-zoo[train]' installs what train needs"
        return _say(USER_ERROR, _line(f"{error.name} is missing: {advice}"))
    except (KeyboardInterrupt, OSError) as error:  # `train` handles these once it has started.
        return _say(*_explain(error, trains))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optim-zoo", description="Large-batch training in JAX whose optimizer you can trust."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train what a config says; the same command on the same folder resumes",
        description="Trains what a TOML config says and writes a run folder with metrics, plots, "
        "checkpoints and report.html. The same command on the same folder resumes.",
    )
    train.add_argument("config", type=Path, help="a TOML file, such as configs/smoke.toml")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides the file, such as train.steps=100 run.dir=runs/trial",
    )
    commands.add_parser(
        "list",
        help="the optimizers, and the ports of other libraries'",
        description="Lists the optimizers with their papers, and the ports by library.",
    )
    show = commands.add_parser(
        "show",
        help="what an optimizer computes, its arguments and what it agrees with",
        description="Shows the formula, the paper and the arguments of an optimizer, and the "
        "recorded trajectories that it follows.",
    )
    show.add_argument("name", metavar="NAME", help="such as lamb, torch.AdamW or torch")
    verify = commands.add_parser(
        "verify",
        help="run recorded trajectories of other libraries' optimizers on this machine",
        description="Runs recorded trajectories of other libraries' optimizers on this machine and "
        "its default device, and prints how far each is missed. The exit code is 1 where one "
        "differs by more than its tolerance.",
    )
    verify.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="an optimizer (lamb), a port (torch.AdamW), a library (torch) or a recorded case "
        "(torch_adamw_sched), the first of these that has the name; all cases if there is none",
    )
    return parser


def _look(parsed: argparse.Namespace) -> int:
    """Runs the commands that only print."""
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
    sys.path.append(os.getcwd())  # for a task or a sink of the user's own, as with `python -m`
    try:
        config = config_file.load(path, overrides)
        folder = Path(config.run.dir or Path("runs") / path.stem).expanduser()
        processes = distributed.start(config.distributed, folder)
    except UserError as error:
        return _say(USER_ERROR, _line(error))
    with processes:
        try:
            return processes.leave(*_ending(lambda: loop.run(config, folder)))
        except (KeyboardInterrupt, OSError) as error:
            return processes.leave(*_explain(error, trains=True))
        except Exception:
            if not processes.joined:
                raise
            traceback.print_exc()
            return processes.leave(1)


def _ending(run: Callable[[], object]) -> tuple[int, str]:
    """Calls a function that trains; returns exit code and last line, empty if all went well."""
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
    """Returns exit code and last line for Ctrl-C, a closed output, or a disk that fails."""
    resumes = "; the same command resumes from what is saved" if trains else ""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, _line(f"interrupted{resumes}")
    _abandon_output()
    if isinstance(error, BrokenPipeError) and not trains:
        return 128 + signal.SIGPIPE, ""  # as in `list | head -1`: the reader has enough
    return USER_ERROR, _line(f"{error.strerror or error}{resumes}")


def _line(message: object) -> str:
    return f"optim-zoo: {message}"


def _say(code: int, line: str) -> int:
    """Prints a last line, unless it is empty, and returns the exit code."""
    if line:
        print(line, file=sys.stderr)
    return code


def _abandon_output() -> None:
    """Redirects a broken standard output to nowhere; Python would complain when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_orbax() -> None:
    """Silences the tracebacks of Orbax's threads; the main thread raises the same errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    sys.exit(main())
