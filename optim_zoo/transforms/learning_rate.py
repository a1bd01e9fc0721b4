"""The learning rate, the last piece of a chain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.tree import Tree


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`, the same for a number and for a schedule."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made
    learning_rate: jax.Array  # (), float32 (float64 under x64): of the last step made


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Turns a direction into a step downhill: u <- -learning_rate u.

    Where the parameters are given the step has their dtype. The state holds the rate that was
    used, so that it can be read, and a run can change from a number to a schedule.

    Args:
      learning_rate: >= 0, or a schedule: step -> learning rate, the first step being 0.

    Raises:
      ValueError: a number that is negative or not finite.
    """
    ranges.check_learning_rate(learning_rate)

    def rate(count: jax.Array) -> jax.Array:
        value = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.array(value, dtype=float)  # float64 under x64; a copy, the state may be donated

    def init(params: Tree) -> ScaleByLearningRateState:
        del params
        count = jnp.zeros((), jnp.int32)
        return ScaleByLearningRateState(count, rate(count))

    def update(
        updates: Tree, state: ScaleByLearningRateState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByLearningRateState]:
        now = rate(state.count)
        like = updates if params is None else params
        steps = jax.tree.map(lambda u, x: (-now * u).astype(x.dtype), updates, like)
        return steps, ScaleByLearningRateState(optax.safe_increment(state.count), now)

    return optax.GradientTransformation(init, update)
