"""Evaluates what a run has trained, without training; see ``optim-zoo evaluate``."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from optim_zoo import train
from optim_zoo.errors import UserError
from optim_zoo.train import config_file, job, saved_config
from optim_zoo.train.config import Config
from optim_zoo.train.run_folder import CHECKPOINTS
from optim_zoo.train.sinks.base import shown_name
from optim_zoo.train.tasks.base import Task


class Metrics(NamedTuple):
    """What `evaluate` returns."""

    values: Mapping[str, float]  # metric -> value, as in metrics.jsonl
    loss_unit: str  # such as "nats", or ""


def evaluate(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    best: bool = False,
    averaged: bool | None = None,
) -> Metrics:
    """Returns the held-out metrics of the parameters that a run has saved.

    The task reads its data as in training. What it makes once from the data, such as tokens, is
    read from the run folder if it is there, and made in a temporary folder otherwise: nothing is
    written to the run folder, which may be in use.

    Args:
      folder: the run folder.
      overrides: ``section.key=value`` for the task's own sections other than ``model``, such as
        ``data.text=other/*.txt``.
      step: the number of steps made; None for the last step that is saved.
      best: whether to evaluate the parameters that ``output.keep_best`` has kept.
      averaged: whether to evaluate the averages of the parameters of ``averaging.decay``; None
        for what the run evaluates. The best parameters are always what the run evaluates.

    Raises:
      UserError: `optim_zoo.train.load` refuses the run or the step; a key is unknown, of another
        section, or has a value that is not allowed; or the data cannot be used with this run.
    """
    folder = folder.expanduser()
    if averaged is None and not best:
        averaged = _evaluates_average(folder)
    loaded = train.load(folder, step, best, averaged)
    config = _config(folder, overrides)
    with tempfile.TemporaryDirectory(prefix="optim-zoo-") as place:
        # As in a run folder: a task may look whether the run has begun.
        (Path(place) / CHECKPOINTS).symlink_to((folder / CHECKPOINTS).absolute())
        cache = Path(place) / "tokens"
        cache.mkdir()
        for path in (folder / "tokens").glob("*"):
            (cache / path.name).symlink_to(path.absolute())
        task = config_file.make_task(config, cache)
        _check_same_meaning(loaded.task, task, folder)
        # One device, where the parameters are.
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        return Metrics(job.evaluation(task, mesh)(loaded.params), task.loss_unit)


def lines(metrics: Metrics) -> list[str]:
    """Returns the metrics as lines, the loss first: ``loss: 4.4123 nats``, ``F1: 0.9123``.

    The cells of a matrix, which have two slashes in their names, are left out.
    """
    unit = f" {metrics.loss_unit}" if metrics.loss_unit else ""
    return [
        f"{shown_name(name)}: {value:.4f}{unit if name == 'loss' else ''}"
        for name, value in metrics.values.items()
        if name.count("/") < 2
    ]


def _evaluates_average(folder: Path) -> bool:
    """Returns whether a run evaluates the average; false where `load` will report an error."""
    path = folder / saved_config.CONFIG_FILE
    averaging = saved_config.load(path).averaging if path.exists() else None
    return averaging is not None and averaging.decay > 0 and averaging.evaluate


def _config(folder: Path, overrides: Sequence[str]) -> Config:
    """Returns the config of a run with overrides of its data."""
    path = folder / saved_config.CONFIG_FILE
    task = saved_config.load(path).task.name
    sections = [name for name in config_file.find_task(task).sections if name != "model"]
    for override in overrides:
        if override.partition(".")[0].strip() not in sections:
            known = " and ".join(f"[{name}]" for name in sections) or "no section"
            raise UserError(
                f"command line ({override}): an evaluation may override keys of {known} only, "
                f"because all others are those that the run was trained with"
            )
    return saved_config.load(path, overrides)


def _check_same_meaning(before: Task, now: Task, folder: Path) -> None:
    """Raises `UserError` unless the data gives the parameters the meaning that they have."""
    changed = [name for name in now.essential if now.identity[name] != before.identity.get(name)]
    if changed:
        raise UserError(
            f"this data does not have the {' and '.join(changed)} that the run in {folder} was "
            f"trained with, so its parameters have another meaning: choose other data"
        )
