"""What the optimizer costs in a training job: its share of the step, and its ratio to optax.adamw.

    python scripts/bench_train_step.py configs/bert_tiny_lamb.toml [section.key=value ...]

Times in one process, all jitted and donating: the config's optimizer alone, and as peers
optax.adamw and optax.lamb on the same tree, taking turns so that a noisy machine hits all alike;
then the job's whole step. Prints one JSON line a measurement: the median and the quartiles in
milliseconds, the temporaries XLA allocates in multiples of the parameters, and the median of the
config's optimizer over this one.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from optim_zoo import sharding
from optim_zoo.train import config_file, optimization, tasks
from optim_zoo.tree import Tree

UPDATE_ROUNDS = 200
STEP_ROUNDS = 40
WARMUP_ROUNDS = 5


class Update:
    """An optimizer's update and the addition to the parameters, jitted and donating."""

    def __init__(self, tx: optax.GradientTransformation, params: Tree, gradients: Tree) -> None:
        def update(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(lambda x: x.copy(), params)
        state = jax.jit(tx.init)(params)
        step = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
        memory: Any = step.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes / sum(
            x.nbytes for x in jax.tree.leaves(params)
        )
        self._step, self._carry, self._gradients = step, (params, state), gradients

    def __call__(self) -> Tree:
        """One step."""
        self._carry = self._step(*self._carry, self._gradients)
        return self._carry


class JobStep:
    """The job's own step on one of its own batches."""

    def __init__(self, step: sharding.DataParallelStep, params: Tree, batch: Tree) -> None:
        self._step, self._batch = step, batch
        self._carry = step.init(params)

    def __call__(self) -> Tree:
        """One step."""
        *carry, loss = self._step(*self._carry, self._batch)
        self._carry = (carry[0], carry[1])
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = config_file.load(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as cache:
        task = tasks.make(config, Path(cache))
        batch = task.batch(0, config.stages[0])
    params = jax.jit(task.init)(jax.random.key(config.run.seed))
    tx = optimization.make_optimizer(config, task.layers)
    weight_decay = config.optimizer.arguments.get("weight_decay", 0.0)

    def mean_loss(params: Tree) -> jax.Array:
        total, weight = task.loss(params, batch)
        return total / weight

    gradients = jax.jit(jax.grad(mean_loss))(params)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    step = sharding.data_parallel(
        task.loss, tx, mesh=mesh, micro_batches=config.train.micro_batches
    )
    clip = optax.clip_by_global_norm(config.train.clip_norm)
    updates = {
        f"clip + optim_zoo.{config.optimizer.name}": tx,
        "clip + optax.adamw": optax.chain(clip, optax.adamw(1e-3, weight_decay=weight_decay)),
        "clip + optax.lamb": optax.chain(clip, optax.lamb(1e-3, weight_decay=weight_decay)),
    }
    candidates = {name: Update(each, params, gradients) for name, each in updates.items()}
    seconds = interleaved(candidates, UPDATE_ROUNDS)
    seconds |= interleaved({"job step": JobStep(step, params, batch)}, STEP_ROUNDS)
    ours = statistics.median(seconds[next(iter(updates))])
    common = {
        "config": arguments.config.stem,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "leaves": len(jax.tree.leaves(params)),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    for name, times in seconds.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(times, n=4))
        measured = {"what": name, "median_ms": median, "quartiles_ms": [low, high]}
        if name in candidates:
            measured["temporaries_per_parameter"] = candidates[name].temporaries
        measured["ours_over_this"] = 1e3 * ours / median
        print(json.dumps({**measured, **common}))


def interleaved(
    candidates: Mapping[str, Callable[[], Tree]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, call in candidates.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
