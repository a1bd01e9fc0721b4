"""The learning rate, mostly the last piece of a chain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.tree import Tree, check_floating


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`, the same for a number and for a schedule."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made
    learning_rate: jax.Array  # (), float32 (float64 under x64): of the last step made


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *, last: bool = True
) -> optax.GradientTransformation:
    """Turns a direction into a step downhill: u <- -learning_rate u.

    Where the parameters are given the step has their dtype. The state holds the rate that was
    used, so that it can be read, and a run can change from a number to a schedule. Takes
    `SparseRows`.

    Args:
      learning_rate: >= 0, or a schedule: step -> learning rate, the first step being 0.
      last: False where another piece comes behind, such as momentum: the step then stays in the
        dtype it was computed in, and `cast_like_params` ends the chain.

    Raises:
      ValueError: a number that is negative or not finite; in ``update``, a gradient has another
        shape than its parameter.
      TypeError: a parameter is not floating-point.
    """
    ranges.check_learning_rate(learning_rate)

    def rate(count: jax.Array) -> jax.Array:
        value = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.array(value, dtype=float)  # float64 under x64; a copy, the state may be donated

    def init(params: Tree) -> ScaleByLearningRateState:
        check_floating(params)
        count = jnp.zeros((), jnp.int32)
        return ScaleByLearningRateState(count, rate(count))

    def update(
        updates: Tree, state: ScaleByLearningRateState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByLearningRateState]:
        now = rate(state.count)
        if params is not None:
            rows.check_updates("scale_by_learning_rate", updates, params, sparse=True)
        like = updates if params is None else params

        def scale(u: jax.Array, x: jax.Array) -> jax.Array:
            step = -now * u
            return step.astype(x.dtype) if last else step

        steps = jax.tree.map(
            lambda u, x: rows.on_rows(scale, u, x), updates, like, is_leaf=rows.is_sparse
        )
        return steps, ScaleByLearningRateState(optax.safe_increment(state.count), now)

    return optax.GradientTransformation(init, update)


def cast_like_params() -> optax.GradientTransformation:
    """Gives each update the dtype of its parameter: the end of a chain that computes wider."""

    def update(
        updates: Tree, state: optax.EmptyState, params: Tree | None = None
    ) -> tuple[Tree, optax.EmptyState]:
        if params is None:
            return updates, state
        rows.check_updates("cast_like_params", updates, params)
        return jax.tree.map(lambda u, x: u.astype(x.dtype), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
