"""Measures what the optimizer costs in a training job, and what `optax.adamw` would cost there.

    python scripts/bench/train_step.py configs/bert_tiny_lamb.toml [section.key=value ...]

The config's optimizer, `optax.adamw` and `optax.lamb` take turns on the same tree of parameters, so
that a noisy machine affects all alike. The job's whole step is timed afterwards. All are jitted and
donate their arguments.

Prints one JSON line per measurement: the median and the quartiles in milliseconds, the temporaries
that XLA allocates, in multiples of the parameters, and the ratio of the config optimizer's median
to this one.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import harness
from optim_zoo import sharding
from optim_zoo.train import config_file, optimization
from optim_zoo.tree import Tree

UPDATE_ROUNDS = 200
STEP_ROUNDS = 40


class JobStep:
    """The job's own step on one of its own batches."""

    def __init__(self, step: sharding.DataParallelStep, params: Tree, batch: Tree) -> None:
        self._step, self._batch = step, batch
        self._carry = step.init(params)

    def __call__(self) -> Tree:
        """Makes one step, and returns the loss."""
        *carry, loss = self._step(*self._carry, self._batch)
        self._carry = (carry[0], carry[1])
        return loss


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    config = config_file.load(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as cache:
        task = config_file.make_task(config, Path(cache))
        batch = task.batch(0, config.stages[0])
    params = jax.jit(task.init)(jax.random.key(config.run.seed))
    tx = optimization.make_optimizer(config, task.layers)
    weight_decay = config.optimizer.arguments.get("weight_decay", 0.0)

    def mean_loss(params: Tree) -> jax.Array:
        total, weight = task.loss(params, batch)
        return total / weight

    gradients = jax.jit(jax.grad(mean_loss))(params)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def loss(params: Tree, batch: Tree) -> sharding.WeightedLoss:
        return sharding.WeightedLoss(*task.loss(params, batch))

    step = sharding.data_parallel(loss, tx, mesh=mesh, micro_batches=config.train.micro_batches)
    clip = optax.clip_by_global_norm(config.train.clip_norm)
    updates = {
        f"clip + optim_zoo.{config.optimizer.name}": tx,
        "clip + optax.adamw": optax.chain(clip, optax.adamw(1e-3, weight_decay=weight_decay)),
        "clip + optax.lamb": optax.chain(clip, optax.lamb(1e-3, weight_decay=weight_decay)),
    }
    candidates = {name: _update(each, params, gradients) for name, each in updates.items()}
    milliseconds = harness.interleaved(candidates, UPDATE_ROUNDS)
    milliseconds |= harness.interleaved({"job step": JobStep(step, params, batch)}, STEP_ROUNDS)
    ours = statistics.median(milliseconds[next(iter(updates))])
    common = {
        "config": arguments.config.stem,
        "parameters": harness.parameters(params),
        "leaves": len(jax.tree.leaves(params)),
        **harness.machine(),
    }
    for name, times in milliseconds.items():
        measured = harness.spread(times)
        if name in candidates:
            measured["temporaries_per_parameter"] = candidates[name].temporaries
        measured["ours_over_this"] = ours / measured["median_ms"]
        harness.show(name, measured, common)


def _update(tx: optax.GradientTransformation, params: Tree, gradients: Tree) -> harness.Step:
    step = harness.Step(tx, harness.update(tx), params, [gradients])
    step.start(jax.tree.map(jnp.copy, params), [gradients])
    return step


if __name__ == "__main__":
    main()
