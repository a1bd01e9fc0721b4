"""``optim-zoo train CONFIG [section.key=value ...]``."""

import argparse
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from optim_zoo.cli import ending, starting
from optim_zoo.errors import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train what a config describes, or resume such a run",
        description="Trains what a TOML config describes, and writes a run folder with metrics, "
        "plots, checkpoints and report.html. The same command on the same folder resumes the run.",
    )
    parser.add_argument("config", type=Path, help="a TOML file, such as configs/smoke.toml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides a key of the file, such as train.steps=100 or run.dir=runs/trial; "
        "key=unset removes it, so that its default applies",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Trains, alone or with the other processes of the run; returns the exit code."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.train import config_file, distributed, loop, saved_config

    starting.quiet_orbax()
    starting.find_user_modules()
    notes: list[str] = []
    path: Path = parsed.config
    overrides: Sequence[str] = parsed.overrides
    starting.check_text(str(path), *overrides)
    # A saved config of an earlier version keeps the values that were its defaults.
    load = saved_config.load if saved_config.folder_of(path) else config_file.load
    config = load(path, overrides, notes)
    folder = _run_folder(path, config.run.dir, overrides)
    with distributed.start(config.distributed, folder) as processes:
        try:
            return processes.leave(*_ending(lambda: loop.run(config, folder, notes)))
        except (KeyboardInterrupt, OSError) as error:
            return processes.leave(*ending.explain(error, resumes=True))
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


def _ending(run: Callable[[], object]) -> tuple[int, str]:
    """Calls a function that trains; returns the exit code and the last line, which may be empty."""
    from optim_zoo.train import distributed

    try:
        run()
    except UserError as error:
        return ending.USER_ERROR, ending.line(error)
    except distributed.Stopped as stopped:
        return 128 + stopped.signal_number, ending.line(stopped) if distributed.is_first() else ""
    except distributed.Lost as lost:
        return distributed.LOST, ending.line(lost)
    return 0, ""
