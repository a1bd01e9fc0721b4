"""The learning rate, mostly the last piece of a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`, the same for a number and for a schedule."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made
    learning_rate: jax.Array  # (), float32 (float64 under x64): of the last step made


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule, *, last: bool = True) -> Leafwise:
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

    def init_shared() -> dict[str, jax.Array]:
        count = jnp.zeros((), jnp.int32)
        return {"count": count, "learning_rate": rate(count)}

    def begin(state: ScaleByLearningRateState) -> tuple[ScaleByLearningRateState, None]:
        return state._replace(
            count=optax.safe_increment(state.count), learning_rate=rate(state.count)
        ), None

    def update(
        u: Any, state: ScaleByLearningRateState, leaf: Leaf
    ) -> tuple[Any, ScaleByLearningRateState]:
        like = u if leaf.parameter is None else leaf.parameter

        def scale(u: jax.Array) -> jax.Array:
            step = -state.learning_rate * u
            return step.astype(like.dtype) if last else step

        return rows.on_rows(scale, u), state

    return leafwise(
        Declaration(
            name="scale_by_learning_rate",
            update=update,
            state=ScaleByLearningRateState,
            init_shared=init_shared,
            begin=begin,
            params="optional",
            takes_rows=True,
        )
    )


def cast_like_params() -> Leafwise:
    """Gives each update the dtype of its parameter: the end of a chain that computes wider."""

    def update(
        u: jax.Array, state: optax.EmptyState, leaf: Leaf
    ) -> tuple[jax.Array, optax.EmptyState]:
        return (u if leaf.parameter is None else u.astype(leaf.parameter.dtype)), state

    return leafwise(Declaration(name="cast_like_params", update=update, params="optional"))
