"""Trains a task many times, by one compiled program for each optimizer and batch size.

The runs of a program follow one another. On a CPU this is faster than ``jax.vmap`` over learning
rates: at 32 windows of 32 bytes, a step of the byte language model takes 19 ms, and 29 ms for each
run where five runs are mapped.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import accumulation, metrics
from optim_zoo.schedules import warmup_polynomial
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.base import Task
from optim_zoo.tree import Tree

Make = Callable[[optax.Schedule], optax.GradientTransformation]

WARMUP = 0.1  # the fraction of the steps in which the learning rate rises
POINTS = 64  # of the curve of the training loss


class Outcome(NamedTuple):
    """What a run has reached."""

    metrics: Mapping[str, float]  # the held-out metrics after the last step
    curve: np.ndarray  # (points,), the mean training loss of consecutive steps


class Problem:
    """A task with the same examples, in the same order, at every batch size."""

    def __init__(self, task: Task, examples: int, micro_size: int) -> None:
        """Prepares the held-out examples.

        Args:
          task: its sequence of examples depends neither on the batch size nor on its past.
          examples: how many of them a run sees; a multiple of every batch size.
          micro_size: how many examples the gradient is computed for at once, a divisor of every
            batch size. The gradients of a step are added up, so that the working memory, and
            with it the time of an example, is the same at every batch size.
        """
        self.task, self.examples, self.micro_size = task, examples, micro_size
        self.held_out: Tree = jax.tree.map(lambda *x: jnp.stack(x), *task.held_out())

    @functools.lru_cache(maxsize=4)  # noqa: B019, as a problem lives as long as the experiment
    def start(self, seed: int) -> tuple[Tree, Tree]:
        """Returns the initial parameters and the examples, (micro-batches, micro_size, ...)."""
        task = copy.copy(self.task)
        task.setup = dataclasses.replace(task.setup, seed=seed)
        stage = dataclasses.replace(task.setup.stages[0], batch_size=self.examples)
        data = {
            name: jnp.asarray(x.reshape(-1, self.micro_size, *x.shape[1:]))
            for name, x in task.batch(0, stage).items()
        }
        return jax.jit(task.init)(jax.random.key(seed, impl=KEYS)), data

    def gradient(self, params: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        """Returns the mean loss of a micro-batch and its gradient."""

        def loss(params: Tree) -> jax.Array:
            found: Any = self.task.loss(params, batch)
            return found.total / found.weight

        return jax.value_and_grad(loss)(params)


def schedule(rate: jax.typing.ArrayLike, steps: int) -> optax.Schedule:
    """Returns a linear warmup over a tenth of the steps, then a linear decay.

    Neither the first nor the last step has the rate 0: with few steps they would be a loss.
    """
    shape = warmup_polynomial(1.0, round(WARMUP * steps), steps + 1)
    return lambda step: rate * shape(step + 1)


def program(problem: Problem, make: Make, batch_size: int) -> Callable[[float, int], Outcome]:
    """Returns a function from learning rate and seed to the outcome of a run.

    Args:
      problem: what is trained.
      make: makes the optimizer from a schedule.
      batch_size: the examples of a step.
    """
    steps = problem.examples // batch_size
    each = max(1, steps // POINTS)  # steps of a point of the curve

    @jax.jit
    def train(rate: jax.Array, params: Tree, data: Tree, held_out: Tree) -> Any:
        tx = make(schedule(rate, steps))

        def step(carry: Any, batch: Tree) -> Any:
            params, state = carry

            def add(total: Any, part: Tree) -> Any:
                return jax.tree.map(jnp.add, total, problem.gradient(params, part)), None

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
            sums, _ = jax.lax.scan(add, zeros, batch)
            loss, gradient = jax.tree.map(lambda x: x * (problem.micro_size / batch_size), sums)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        batches = jax.tree.map(
            lambda x: x.reshape(steps, batch_size // problem.micro_size, *x.shape[1:]), data
        )
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        measured = jax.lax.map(lambda batch: problem.task.measure(params, batch), held_out)
        return losses, jax.tree.map(jnp.sum, measured)

    def run(rate: float, seed: int) -> Outcome:
        losses, measured = train(jnp.float32(rate), *problem.start(seed), problem.held_out)
        whole = np.asarray(losses, np.float64)[: steps // each * each]
        found = {name: float(total / weight) for name, (total, weight) in measured.items()}
        return Outcome(found, whole.reshape(-1, each).mean(1))

    return run


def curve_steps(steps: int) -> np.ndarray:
    """Returns the step at the middle of each point of a curve, as a number of steps done."""
    each = max(1, steps // POINTS)
    return np.arange(steps // each) * each + (each - 1) / 2


def noise_scales(
    problem: Problem, make: Make, batch_size: int, rate: float, seed: int, decay: float
) -> np.ndarray:
    """Returns the gradient noise scale after every step of a run, (steps,), in examples.

    It is measured by `optim_zoo.accumulation.accumulate` from the micro-batches of a step.
    """
    steps, every = problem.examples // batch_size, batch_size // problem.micro_size

    @jax.jit
    def train(rate: jax.Array, params: Tree, data: Tree) -> jax.Array:
        tx = accumulation.accumulate(
            make(schedule(rate, steps)), every, noise_scale=True, noise_decay=decay
        )

        def micro_batch(carry: Any, batch: Tree) -> Any:
            params, state = carry
            _, gradient = problem.gradient(params, batch)
            updates, state = tx.update(gradient, state, params, weight=problem.micro_size)
            return (optax.apply_updates(params, updates), state), None

        def step(carry: Any, batch: Tree) -> Any:
            carry, _ = jax.lax.scan(micro_batch, carry, batch)
            return carry, metrics.read(carry[1])["gradient_noise_scale"]

        batches = jax.tree.map(lambda x: x.reshape(steps, every, *x.shape[1:]), data)
        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    return np.asarray(train(jnp.float32(rate), *problem.start(seed)))
