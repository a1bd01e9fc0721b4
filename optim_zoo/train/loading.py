"""Loads what a run has trained; see `optim_zoo.train.load`."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax

from optim_zoo.errors import UserError
from optim_zoo.train import config_file, saved_config, saved_params
from optim_zoo.train.checkpoint_records import Damaged
from optim_zoo.train.job import initial_params
from optim_zoo.train.run_folder import BEST, CHECKPOINTS, saved_steps
from optim_zoo.train.tasks.base import Loaded, Task


def load(folder: Path, step: int | None, best: bool, averaged: bool | None) -> Loaded:
    """Returns the record of a run; see `optim_zoo.train.load`."""
    folder = folder.expanduser().absolute()  # as Orbax demands
    path = folder / saved_config.CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"expected the folder of a run, but {folder} has no {path.name}: name a folder that "
            f"optim-zoo train has written"
        )
    config = saved_config.load(path)
    task = config_file.make_task(config, folder / "tokens", reads_data=False)
    # Before the arrays: another vocabulary may also have another number of tokens.
    _check_essential(folder, step, best, task)
    shapes = jax.eval_shape(lambda: initial_params(config, task))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    found = saved_params.read(folder, like, step=step, best=best, averaged=averaged)
    for note in found.notes:
        warnings.warn(note, stacklevel=3)
    return task.loaded(found.params, found.step)


def _check_essential(folder: Path, step: int | None, best: bool, task: Task) -> None:
    """Checks that what gives the parameters their meaning is what the run was trained with.

    Raises:
      UserError: it is not.
    """
    identity = _identity(folder, step, best)
    changed = [
        name
        for name in task.essential
        if name in identity and identity[name] != task.identity.get(name)
    ]
    if changed:
        raise UserError(
            f"expected the {' and '.join(changed)} that the run in {folder} was trained with, but "
            f"the run folder has another, so its parameters have another meaning: restore it, or "
            f"correct its path in {folder / saved_config.CONFIG_FILE}"
        )


def _identity(folder: Path, step: int | None, best: bool) -> Mapping[str, str]:
    """Returns the digests of the data that were saved with a step; none if it cannot be read."""
    places = [
        folder / name / str(each)
        for name in ([BEST] if best else []) + [CHECKPOINTS]
        for each in reversed(saved_steps(folder, name))
        if step in (None, each)
    ]
    for place in places:
        with contextlib.suppress(Damaged):
            info = saved_params.info(place)
            if "identity" in info:  # parameters kept as the best ones may have no identity
                return dict(info["identity"])
    return {}
