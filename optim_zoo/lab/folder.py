"""The folder of a sweep: what it holds, its lock, and whether it belongs to this sweep.

======================  ============================================================
``base.toml``           the config that the runs started from, as it was at the start
``sweep.json``          the sweep file, the metric, and the units of the task
``results.jsonl``       one flat object for each run that has ended
``runs/ID/``            the run folders, with ``trial.toml``, the config of the run,
                        ``outcome.json``, how it ended, and what it printed
``report.html``         the report, with its plots next to it
======================  ============================================================
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optim_zoo.errors import UserError
from optim_zoo.lab.sweep_file import Sweep
from optim_zoo.train import config_file, saved_config
from optim_zoo.train.config_values import find_task
from optim_zoo.train.files import replace_file

BASE, ABOUT, RESULTS, OUTCOME = "base.toml", "sweep.json", "results.jsonl", "outcome.json"


@dataclasses.dataclass(frozen=True)
class About:
    """What the report of a sweep needs to know besides the results."""

    file: str  # the path of the sweep file
    metric: str
    higher_is_better: bool
    unit: str  # what the task counts, such as images
    loss_unit: str
    search_runs: int = 0  # the budget of a search; 0 for a grid
    search_seeds: tuple[int, ...] = ()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Creates the folder and keeps other sweeps out of it for the duration of the block.

    Raises:
      UserError: another sweep is running there, or the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot create the sweep's folder {folder}: {error.strerror}; name another one with "
            "dir="
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another sweep is running in {folder}: wait until it ends, or name another folder "
                "with dir="
            ) from None
        yield


def check(sweep: Sweep) -> None:
    """Checks that the folder is new or belongs to this sweep, and writes what describes it.

    Raises:
      UserError: it belongs to another sweep, to a training run, or to another state of the config.
    """
    folder = sweep.folder
    base = config_file.load(sweep.base)
    if (folder / ABOUT).exists():
        before = read_about(folder)
        if Path(before.file).name != sweep.path.name:
            raise UserError(
                f"{folder} holds the sweep {before.file}, not {sweep.path}: name another folder "
                "with dir="
            )
        changed = saved_config.differences(saved_config.load(folder / BASE), base)
        if changed:
            raise UserError(
                f"{sweep.base} has changed since the runs in {folder} ({'; '.join(changed)}): name "
                f"another folder with dir=, or remove {folder} to run all of them again"
            )
    elif any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "config.toml")):
        raise UserError(
            f"{folder} is the folder of a training run: name another one for the sweep with dir="
        )
    task = find_task(base.task.name)
    search = sweep.search
    about = About(
        str(sweep.path.absolute()), sweep.metric, sweep.higher_is_better, task.unit, task.loss_unit,
        search.runs if search else 0, search.seeds if search else (),
    )  # fmt: skip
    if not (folder / BASE).exists():
        replace_file(folder / BASE, saved_config.to_toml(base).encode())
    text = json.dumps(dataclasses.asdict(about), indent=2, ensure_ascii=False)
    replace_file(folder / ABOUT, text.encode() + b"\n")


def read_about(folder: Path) -> About:
    """Returns what ``sweep.json`` says.

    Raises:
      UserError: the folder has no such file, or it cannot be read.
    """
    values = read_json(folder / ABOUT)
    known = {field.name for field in dataclasses.fields(About)}
    try:
        values["search_seeds"] = tuple(values.get("search_seeds", ()))
        return About(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise UserError(f"{folder / ABOUT} does not describe a sweep: remove the folder") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file cannot be read, or it does not hold an object.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"expected the folder of a sweep, which has {path.name}, got {path.parent}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: restore it or remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object: restore it or remove it")
    return values
