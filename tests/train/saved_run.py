"""Writes a run folder without training."""

from pathlib import Path

import jax
import jax.numpy as jnp

from optim_zoo.train import config_file, saved_config
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.job import initial_params
from optim_zoo.tree import Tree


def write_run(folder: Path, *overrides: str) -> Path:
    """Returns a run folder with checkpoints of steps 4 and 6, as a run would write it.

    The parameters are the initial ones times the step.
    """
    folder.mkdir(parents=True)
    path = folder / "config.toml"
    path.touch()
    config = config_file.load(path, overrides)
    task = config_file.make_task(config, folder / "tokens", reads_data=False)
    params = initial_params(config, task)
    info = {"machine": {}, "identity": dict(task.identity)}
    with Checkpoints(folder, 2) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, scaled(params, step), {"mu": params}, info)
    path.write_text(saved_config.of_run(config, folder))
    return folder


def scaled(params: Tree, step: int) -> Tree:
    """Returns the parameters of a step."""
    return jax.tree.map(lambda x: x * jnp.asarray(step, x.dtype), params)
