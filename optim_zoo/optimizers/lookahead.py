"""Lookahead (Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, arXiv 1907.08610)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import parameters_missing
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.leafwise import zeros
from optim_zoo.tree import Tree, check_floating, map_to_several, promoting, wide, wide_copy


class LookaheadState(NamedTuple):
    """State of `lookahead`."""

    fast_steps: jax.Array  # (), int32: steps made; before an overflow it goes back by whole periods
    slow: Tree  # like the parameters, in float32 or wider: the slow weights
    inner: Any  # state of the inner optimizer


@accepts_optax_arguments
def lookahead(
    inner: optax.GradientTransformation,
    sync_period: int = 6,
    slow_step_size: jax.typing.ArrayLike = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Moves slow weights towards the fast weights of an inner optimizer, which restarts from them.

    ::

        fast <- fast + inner(g)
        after the steps sync_period, 2 sync_period, ...:
            slow <- slow + slow_step_size (fast - slow),   fast <- slow

    The parameters are the fast weights. The slow weights are in the state and start as a copy of
    the parameters, as in the paper's code for PyTorch (arXiv 1907.08610). ``optax.lookahead`` needs
    parameters that hold both. Ours agrees with it (0.2.8) to 1e-9 in float64.

    Args:
      inner: An optimizer with its learning rate, of this library or of optax. Its state is not
        changed when the weights are synchronized.
      sync_period: The number of steps from one synchronization to the next, a whole number >= 1; k
        of the paper.
      slow_step_size: The share of the way that the slow weights move, in (0, 1]; alpha of the
        paper.

    Returns:
      A transformation whose state is ``LookaheadState``: the step, the slow weights (like the
      parameters, in float32 or wider) and the state of inner. From ``jax.ShapeDtypeStruct``s,
      ``init`` makes slow weights that are shapes too.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, the parameters are
        missing, or a gradient has another shape than its parameter.
      ArgumentTypeError: ``inner`` is not an ``optax.GradientTransformation``; in ``init``, a
        parameter is not a real floating-point array; in ``update``, a gradient is `SparseRows`.

    Example:
      ```python
      tx = optim_zoo.lookahead(optim_zoo.adam(1e-3), sync_period=5)
      ```
    """
    ranges.check_count("sync_period", sync_period, 1)
    ranges.check("slow_step_size", slow_step_size, 0.0, 1.0, open_low=True)
    return synchronize(
        inner, lambda t: t % sync_period == 0, lambda t: slow_step_size, period=sync_period
    )


def synchronize(
    inner: optax.GradientTransformation,
    is_due: Callable[[jax.Array], jax.Array],
    slow_step_size: Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    period: int | None = None,
    slow_starts_at_zero: bool = False,
    after: Callable[[jax.Array, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs Lookahead with everything passed in that implementations differ in.

    Args:
      inner: An optimizer.
      is_due: Whether to synchronize after step t = 1, 2, ...: a function from () int32 to () bool.
      slow_step_size: A function from step t to alpha, the share of the way that the slow weights
        move.
      period: The period of ``is_due``, so that it continues after 2^31 - 1 steps. If None, t stays
        at that number.
      slow_starts_at_zero: Whether the slow weights start at 0, a defect of some implementations;
        otherwise they start as the parameters.
      after: A function (is due, state of inner) -> state of inner, called after each step.

    Returns:
      A transformation whose state is `LookaheadState`.

    Raises:
      ArgumentTypeError: ``inner`` is not an ``optax.GradientTransformation``.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> LookaheadState:
        check_floating(params)
        slow = jax.tree.map(zeros if slow_starts_at_zero else wide_copy, params)
        return LookaheadState(jnp.zeros((), jnp.int32), slow, inner.init(params))

    @promoting
    def update(
        updates: Tree, state: LookaheadState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, LookaheadState]:
        if params is None:
            raise parameters_missing("lookahead")
        rows.check_updates("lookahead", updates, params)
        steps, inner_state = inner.update(updates, state.inner, params, **extra_args)
        t = _next_step(state.fast_steps, period)
        alpha = slow_step_size(t)

        def synchronized(u: jax.Array, x: jax.Array, slow: jax.Array) -> tuple[jax.Array, ...]:
            fast = wide(x) + u
            slow = jnp.asarray(slow + alpha * (fast - slow), slow.dtype)
            return (slow - wide(x)).astype(u.dtype), slow

        due = is_due(t)
        steps, slow = jax.lax.cond(
            due,
            lambda steps, slow: map_to_several(synchronized, 2, steps, params, slow),
            lambda steps, slow: (steps, slow),
            steps,
            state.slow,
        )
        inner_state = inner_state if after is None else after(due, inner_state)
        return steps, LookaheadState(t, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _next_step(count: jax.Array, period: int | None) -> jax.Array:
    """Returns count + 1 or, where that overflows, the same place in the second period."""
    if period is None:
        return optax.safe_increment(count)
    last = jnp.iinfo(count.dtype).max
    # Not the first period, whose synchronization may be a special one.
    back = jnp.maximum(last // period - 1, 1) * period
    return jnp.where(count < last, count + 1, last - back + 1).astype(count.dtype)
