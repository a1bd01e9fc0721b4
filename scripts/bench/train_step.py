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
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import harness
import job_step
from optim_zoo.tree import Tree

UPDATE_ROUNDS = 200
STEP_ROUNDS = 40


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    job = job_step.load(arguments.config, arguments.overrides)
    config, params = job.config, job.params
    weight_decay = config.optimizer.arguments.get("weight_decay", 0.0)

    def mean_loss(params: Tree) -> jax.Array:
        total, weight = job.loss(params, job.batch)
        return total / weight

    gradients = jax.jit(jax.grad(mean_loss))(params)
    step = job.step(micro_batches=config.train.micro_batches)
    clip = optax.clip_by_global_norm(config.train.clip_norm)
    updates = {
        f"clip + optim_zoo.{config.optimizer.name}": job.tx,
        "clip + optax.adamw": optax.chain(clip, optax.adamw(1e-3, weight_decay=weight_decay)),
        "clip + optax.lamb": optax.chain(clip, optax.lamb(1e-3, weight_decay=weight_decay)),
    }
    candidates = {name: _update(each, params, gradients) for name, each in updates.items()}
    milliseconds = harness.interleaved(candidates, UPDATE_ROUNDS)
    milliseconds |= harness.interleaved({"job step": job_step.JobStep(step, job)}, STEP_ROUNDS)
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
