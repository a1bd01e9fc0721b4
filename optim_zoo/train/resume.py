"""Starts a run anew, or resumes it from the last checkpoint in its folder."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from optim_zoo.errors import UserError
from optim_zoo.train import saved_config
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.config import Config
from optim_zoo.train.job import Job
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.tree import Tree


class Start(NamedTuple):
    """Where a run starts."""

    step: int  # the number of steps made before
    params: Tree  # in the layout of `Job.step`
    state: Tree  # the optimizer state, in the same layout
    notes: list[str]  # sentences for the user
    info: Mapping[str, Any] = MappingProxyType({})  # what the checkpoint has recorded


def start(job: Job, checkpoints: Checkpoints) -> Start:
    """Returns the initial state of a new run, or that of the last undamaged checkpoint.

    Raises:
      UserError: the checkpoint is of another model, optimizer or data, or cannot be read.
    """
    params, state = job.init(anew=checkpoints.last_step is None)
    if checkpoints.last_step is None:
        return Start(0, params, state, [])
    found = checkpoints.restore(
        *job.plain((params, state)),
        changes=_accepted_changes(job.config, job.folder),
        check=lambda step, before: _check_data(job, step, before),
    )
    params, state = job.steps[0].place(found.params, found.state)
    notes = [*found.notes, *_changes(found.info["machine"], job.machine)]
    notes.append(f"resuming from the checkpoint of step {found.step} in {job.folder}")
    return Start(found.step, params, state, notes, found.info)


def check_config(config: Config, folder: Path) -> None:
    """Checks that the folder holds no checkpoint of another config.

    Raises:
      UserError: it holds one, and ``run.accept_changes`` is not set.
    """
    if saved_steps(folder) and not config.run.accept_changes:
        changed = _config_changes(config, folder)
        if changed:
            raise UserError(
                f"{folder} holds a run of another config ({'; '.join(changed)}): choose another "
                f"folder with run.dir, or set run.accept_changes=true to use the new values"
            )


def _accepted_changes(config: Config, folder: Path) -> list[str]:
    """Returns how the config differs, if that is accepted and the saved config can be read."""
    with contextlib.suppress(UserError):
        return _config_changes(config, folder) if config.run.accept_changes else []
    return []


def _config_changes(config: Config, folder: Path) -> list[str]:
    """Returns how the config differs from the one in the run folder."""
    path = folder / saved_config.CONFIG_FILE
    return saved_config.differences(saved_config.load(path), config) if path.exists() else []


def _check_data(job: Job, step: int, before: Mapping[str, Any]) -> None:
    """Raises `UserError` unless the checkpoint that ``before`` describes belongs to this job."""
    if step > job.config.total_steps:
        raise UserError(
            f"the checkpoint is of step {step}, beyond the {job.config.total_steps} steps of this "
            f"config: raise train.steps, or choose another folder with run.dir"
        )
    identity = job.task.identity
    changed = [name for name in identity if before["identity"].get(name) != identity[name]]
    essential = [name for name in changed if name in job.task.essential]
    if essential:
        raise UserError(
            f"this checkpoint was trained with another {' and another '.join(essential)}, so its "
            "parameters have another meaning: restore the old one, or choose another folder with "
            "run.dir"
        )
    if changed and not job.config.run.accept_changes:
        raise UserError(
            f"this checkpoint was trained with another {' and another '.join(changed)}: restore "
            "the old one, choose another folder with run.dir, or continue with "
            "run.accept_changes=true"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a note about each change of the machine."""
    return [
        f"note: {name} was {before.get(name)} and is {value} now, so the last bits may "
        f"differ from those of an uninterrupted run"
        for name, value in now.items()
        if before.get(name) != value
    ]
