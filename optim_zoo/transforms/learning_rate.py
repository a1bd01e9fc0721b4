"""The learning rate, which is usually the last piece of a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`, the same for a number and for a schedule.

    The names are not ``count`` and ``learning_rate``, so that ``optax.tree.get`` finds the count
    of the optimizer and the rate of ``optax.inject_hyperparams`` without ambiguity.
    """

    step: jax.Array  # (), int32: steps made
    rate: jax.Array  # (), float32 (float64 under x64): the learning rate of the last step


@accepts_optax_arguments
def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule, *, last: bool = True) -> Leafwise:
    """Turns a direction u into an update that points downhill.

    ::

        u <- -learning_rate u

    Where the parameters are passed to ``update``, the result has their dtypes. The state holds the
    learning rate that was used, so that it can be read from the state, and so that a run can change
    from a number to a schedule. Updates may be `SparseRows`.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      last: Whether the piece is the last of its chain. Pass False where another piece follows, such
        as momentum: the update then keeps the dtype in which it was computed, and
        `cast_like_params` ends the chain.

    Returns:
      A piece whose state is `ScaleByLearningRateState`.

    Raises:
      ArgumentValueError: ``learning_rate`` is a number that is negative or not finite; in
        ``update``, a gradient has another shape than its parameter.
      ArgumentTypeError: ``learning_rate`` is neither a number nor a function; in ``init``, a
        parameter is not a real floating-point array.

    Example:
      ```python
      schedule = optim_zoo.schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=100)
      tx = optax.chain(optim_zoo.scale_by_adam(), optim_zoo.scale_by_learning_rate(schedule))
      ```
    """
    ranges.check_learning_rate(learning_rate)

    def rate_at(step: jax.Array) -> jax.Array:
        value = learning_rate(step) if callable(learning_rate) else learning_rate
        return jnp.array(value, dtype=float)  # float64 under x64; a copy, the state may be donated

    def init_shared() -> dict[str, jax.Array]:
        step = jnp.zeros((), jnp.int32)
        return {"step": step, "rate": rate_at(step)}

    def begin(state: ScaleByLearningRateState) -> tuple[ScaleByLearningRateState, None]:
        step = optax.safe_increment(state.step)
        return state._replace(step=step, rate=rate_at(state.step)), None

    def update(
        u: Any, state: ScaleByLearningRateState, leaf: Leaf
    ) -> tuple[Any, ScaleByLearningRateState]:
        like = u if leaf.parameter is None else leaf.parameter

        def scale(u: jax.Array) -> jax.Array:
            scaled = -state.rate * u
            return scaled.astype(like.dtype) if last else scaled

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
    """Casts each update to the dtype of its parameter.

    It ends a chain whose last piece computes in float32 or wider. Without parameters, the updates
    pass unchanged.

    Returns:
      A piece with an empty state.

    Raises:
      ArgumentValueError: In ``update``, a gradient has another shape than its parameter.
      ArgumentTypeError: In ``init``, a parameter is not a real floating-point array.

    Example:
      ```python
      tx = optax.chain(
          optim_zoo.scale_by_learning_rate(0.1, last=False),
          optim_zoo.trace_momentum(0.9),
          optim_zoo.cast_like_params(),
      )
      ```
    """

    def update(
        u: jax.Array, state: optax.EmptyState, leaf: Leaf
    ) -> tuple[jax.Array, optax.EmptyState]:
        return (u if leaf.parameter is None else u.astype(leaf.parameter.dtype)), state

    return leafwise(Declaration(name="cast_like_params", update=update, params="optional"))
