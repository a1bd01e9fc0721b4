"""Runs ``optim-zoo`` with faults injected into the task's batches and into the clock.

    python scripts/faults/injection.py INJECTION train CONFIG [section.key=value ...]

INJECTION is a JSON object with the fields of `Injection`; the other arguments are passed on to the
command line of ``optim-zoo``. This is the only file of the folder that uses the job's own modules.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo import cli
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train import config_file
from optim_zoo.train.config import Config
from optim_zoo.train.tasks.base import Task
from optim_zoo.tree import Tree


@dataclasses.dataclass(frozen=True)
class Injection:
    """The faults of one job. Batches are numbered from 0."""

    what: str = ""  # "weights", "gradient" or "loss": what `value` is applied to; "" for nothing
    batches: tuple[int, int] = (0, 0)  # the first faulty batch, and the first one after them
    rows: tuple[int, int] = (0, 1 << 30)  # the faulty rows of these batches, in the same way
    value: float = math.nan  # multiplies the weights or the gradient, or is added to the loss
    left_out: tuple[int, int] = (0, 0)  # batches that are replaced by those that follow them
    # (batch, seconds): the clock jumps by so many seconds when the batch is requested
    clock: tuple[tuple[int, float], ...] = ()

    def inject(self, task: Task) -> Task:
        """Puts these faults into a task, and returns it."""
        healthy_batch, healthy_loss = task.batch, task.loss
        if self.clock:
            _advance_clock(0.0)
        neutral = 0.0 if self.what == "loss" else 1.0
        jumps = dict(self.clock)

        def batch(number: int, stage: Any) -> Tree:
            if number in jumps:
                _advance_clock(jumps[number])
            first, after = self.left_out
            made = healthy_batch(number + (after - first if number >= first else 0), stage)
            fault = np.full(len(made["masked_weights"]), neutral, np.float32)
            if self.batches[0] <= number < self.batches[1]:
                fault[slice(*self.rows)] = self.value
            if self.what == "weights":
                return {**made, "masked_weights": made["masked_weights"] * fault[:, None]}
            return {**made, "fault": fault} if self.what else made

        def loss(params: Tree, batch: Tree) -> WeightedLoss:
            total, weight = healthy_loss(params, batch)
            if self.what == "gradient":
                total = _scale_gradient(total, jnp.max(batch["fault"]))
            elif self.what == "loss":
                total += jnp.sum(batch["fault"])
            return WeightedLoss(total, weight)

        task.batch, task.loss = batch, loss  # type: ignore[method-assign]
        return task


@jax.custom_vjp
def _scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns ``x``; its gradient is multiplied by ``factor``."""
    return x


_scale_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


def _advance_clock(seconds: float) -> None:
    """Replaces the wall clock. A monotonic clock does not jump on a real machine either."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def batch_size(config: Path, overrides: Sequence[str]) -> int:
    """Returns the rows of a batch of the first stage of a config."""
    return config_file.load(config, overrides).train.batch_size


def main(arguments: Sequence[str]) -> int:
    injection, *rest = arguments
    faults, make_task = Injection(**json.loads(injection)), config_file.make_task

    def make_faulty(config: Config, cache: Path, *, reads_data: bool = True) -> Task:
        return faults.inject(make_task(config, cache, reads_data=reads_data))

    config_file.make_task = make_faulty
    return cli.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
