"""The command line: ``optim-zoo train | list | show | verify``. Parses and calls."""

import argparse
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0, 1 where `verify` finds a difference, 2 for a user's mistake, 75 where another process of the
    run is lost, 128 + n for signal n.
    """
    parsed = _parser().parse_args(arguments)
    trains = parsed.command == "train"
    saved = "; the same command goes on from what is saved" if trains else ""
    try:
        return _train(parsed.config, parsed.overrides) if trains else _look(parsed)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "optim_zoo" or not trains:
            raise
        message = (
            f"{error.name} is missing: pip install 'optim-zoo[train]' installs what train needs"
        )
        print(f"optim-zoo: {message}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return _leave(128 + signal.SIGINT, f"interrupted{saved}")
    except OSError as error:  # an output that is closed, or a disk that fails
        _abandon_output()
        if isinstance(error, BrokenPipeError) and not trains:
            return 128 + signal.SIGPIPE  # such as `list | head -1`: the reader has enough
        return _leave(USER_ERROR, f"{error.strerror or error}{saved}")


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
    """The commands that write nothing but what they print."""
    # Here and not on top: jax takes a second.
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
        print(f"optim-zoo: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _train(path: Path, overrides: Sequence[str]) -> int:
    # Here and not on top: the library itself does without the extra `train`.
    import jax

    from optim_zoo.errors import UserError
    from optim_zoo.train import config_file, loop, processes
    from optim_zoo.train.signals import Stopped

    _quiet_orbax()
    try:
        loaded = config_file.load(path, overrides)
        folder = Path(loaded.run.dir or Path("runs") / path.stem).expanduser()
        processes.start(loaded.distributed, folder)
        loop.run(loaded, folder)
    except UserError as error:
        return _leave(USER_ERROR, error)
    except Stopped as stopped:
        return _leave(128 + stopped.signal_number, stopped if processes.is_first() else "")
    except processes.Lost as lost:
        return _leave(processes.LOST, lost)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        return _leave(1)  # or Python would wait for the other processes before it ends
    return _leave(0)


def _leave(code: int, message: str | Exception = "") -> int:
    """Prints a message, if any, and leaves with the other processes of a run, if it has any."""
    sentence = f"optim-zoo: {message}" if message else ""
    processes = sys.modules.get("optim_zoo.train.processes")
    if processes is not None:
        return int(processes.leave(code, sentence))
    if sentence:
        print(sentence, file=sys.stderr)
    return code


def _abandon_output() -> None:
    """Points standard output nowhere, or Python complains when it flushes it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_orbax() -> None:
    """Silences the tracebacks of Orbax's threads: what they fail at is raised, and told once."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    sys.exit(main())
