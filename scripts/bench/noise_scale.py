"""Measures what the gradient noise scale adds to a training step of a BERT-like task.

    python scripts/bench/noise_scale.py configs/bert_tiny_lamb.toml [section.key=value ...]

The step of `optim_zoo.sharding.data_parallel` with ``noise_scale=True`` and the one without take
turns on the same batch, so that a noisy machine affects both alike. A config with one micro-batch
is measured with two.

Prints one JSON line for each: the median and the quartiles in milliseconds, the operations and the
bytes that XLA counts in the compiled step, and the ratios of these figures to the step without the
noise scale. The ratio of times is the median of the ratios of all turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import harness
from optim_zoo import sharding
from optim_zoo.train import config_file, optimization
from optim_zoo.tree import Tree

ROUNDS = 40


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the number of turns")
    arguments = parser.parse_args(argv)
    config = config_file.load(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as cache:
        task = config_file.make_task(config, Path(cache))
        batch = task.batch(0, config.stages[0])
    params = jax.jit(task.init)(jax.random.key(config.run.seed))
    tx = optimization.make_optimizer(config, task.layers)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    micro_batches = max(config.train.micro_batches, 2)

    def loss(params: Tree, batch: Tree) -> sharding.WeightedLoss:
        return sharding.WeightedLoss(*task.loss(params, batch))

    costs: dict[str, Any] = {}
    steps = {}
    for name, noise_scale in (("without", False), ("with noise_scale", True)):
        step = sharding.data_parallel(
            loss, tx, mesh=mesh, micro_batches=micro_batches, noise_scale=noise_scale
        )
        costs[name] = step.lower(params, batch).compile().cost_analysis()
        steps[name] = _Step(step, params, batch)
    milliseconds = harness.interleaved(steps, arguments.rounds)
    common = {
        "config": arguments.config.stem,
        "micro_batches": micro_batches,
        "parameters": harness.parameters(params),
        **harness.machine(),
    }
    for name, times in milliseconds.items():
        measured = harness.spread(times)
        turns = zip(times, milliseconds["without"], strict=True)
        measured["time_ratio"] = statistics.median(x / y for x, y in turns)
        for key in ("flops", "bytes accessed"):
            label = key.replace(" ", "_")
            measured[label] = costs[name][key]
            measured[f"{label}_ratio"] = costs[name][key] / costs["without"][key]
        harness.show(name, measured, common)


class _Step:
    """One step on one batch, which continues from its last parameters and state."""

    def __init__(self, step: sharding.DataParallelStep, params: Tree, batch: Tree) -> None:
        self._step, self._batch = step, batch
        self._carry = step.init(params)

    def __call__(self) -> Tree:
        """Makes one step, and returns the loss."""
        *carry, loss = self._step(*self._carry, self._batch)
        self._carry = (carry[0], carry[1])
        return loss


if __name__ == "__main__":
    main()
