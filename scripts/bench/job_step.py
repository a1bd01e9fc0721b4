"""The step of a training job, for measurements: its task, one batch, and the whole step."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from optim_zoo import sharding
from optim_zoo.train import config_file, optimization
from optim_zoo.train.config import Config
from optim_zoo.tree import Tree


class Job(NamedTuple):
    """What a config describes."""

    config: Config
    loss: Any  # of parameters and a batch, as `data_parallel` takes it
    batch: Tree  # the first one
    params: Tree  # the initial ones
    tx: optax.GradientTransformation  # with clipping

    def step(self, **arguments: Any) -> sharding.DataParallelStep:
        """Returns the step over all devices; ``arguments`` are those of `data_parallel`."""
        mesh = Mesh(np.array(jax.devices()), ("data",))
        return sharding.data_parallel(self.loss, self.tx, mesh=mesh, **arguments)


def load(path: Path, overrides: Sequence[str]) -> Job:
    """Returns the job of a config file."""
    config = config_file.load(path, overrides)
    with tempfile.TemporaryDirectory() as cache:
        task = config_file.make_task(config, Path(cache))
        batch = task.batch(0, config.stages[0])

    def loss(params: Tree, batch: Tree) -> sharding.WeightedLoss:
        return sharding.WeightedLoss(*task.loss(params, batch))

    params = jax.jit(task.init)(jax.random.key(config.run.seed))
    return Job(config, loss, batch, params, optimization.make_optimizer(config, task.layers))


class JobStep:
    """A step on one batch, which continues from its last parameters and state."""

    def __init__(self, step: sharding.DataParallelStep, job: Job) -> None:
        self._step, self._batch = step, job.batch
        self._carry = step.init(job.params)

    def __call__(self) -> Tree:
        """Makes one step, and returns the loss."""
        *carry, loss = self._step(*self._carry, self._batch)
        self._carry = (carry[0], carry[1])
        return loss
