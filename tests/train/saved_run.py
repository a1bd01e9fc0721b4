"""Writes a run folder without training."""

from pathlib import Path

import jax
import jax.numpy as jnp

import optim_zoo
from optim_zoo import averaging
from optim_zoo.train import config_file, saved_config
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.job import initial_params
from optim_zoo.tree import Tree


def write_run(folder: Path, *overrides: str) -> Path:
    """Returns a run folder with checkpoints of steps 4 and 6, as a run would write it.

    The parameters are the initial ones times the step, and their average is the initial ones.
    """
    folder.mkdir(parents=True)
    path = folder / "config.toml"
    path.touch()
    config = config_file.load(path, overrides)
    task = config_file.make_task(config, folder / "tokens", reads_data=False)
    params = initial_params(config, task)
    state = averaging.average_parameters(optim_zoo.sgd(0.1), 0.9).init(params)
    info = {"machine": {}, "identity": dict(task.identity)}
    with Checkpoints(folder, 2) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, scaled(params, step), state, info)
    path.write_text(saved_config.of_run(config, folder))
    return folder


def scaled(params: Tree, step: int) -> Tree:
    """Returns the parameters of a step."""
    return jax.tree.map(lambda x: x * jnp.asarray(step, x.dtype), params)
