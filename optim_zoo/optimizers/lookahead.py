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
from optim_zoo.tree import Tree, check_floating, map_to_several, wide, wide_dtype


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
    """Lets slow weights follow those of an inner optimizer, and goes back to them.

    ::

        fast <- inner step
        after steps sync_period, 2 sync_period, ...:
            slow <- slow + slow_step_size (fast - slow),   fast <- slow

    The parameters are the fast weights and stay plain; the slow ones are in the state and begin
    as a copy of the parameters, as in the paper's code for PyTorch. (``optax.lookahead`` takes
    parameters that hold both.) Agrees with it (0.2.8) to 1e-9 in float64.

    Args:
      inner: an optimizer, with its learning rate. Its own state is not changed.
      sync_period: k of the paper, a whole number >= 1.
      slow_step_size: alpha of the paper, in (0, 1].

    Raises:
      TypeError: ``inner`` is no ``optax.GradientTransformation``, or its updates are `SparseRows`.
      ValueError: a number is out of its range; ``update`` is called without parameters.
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
    """Lookahead where all that its implementations differ in is told.

    Args:
      inner: an optimizer.
      is_due: whether to synchronize after step t = 1, 2, ...; () int32 -> () bool.
      slow_step_size: alpha, of step t.
      period: of ``is_due``, so that it goes on after 2^31 - 1 steps; without, t stays there.
      slow_starts_at_zero: the defect of some of them; else slow starts as the parameters.
      after: (is due, state of inner) -> state of inner.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> LookaheadState:
        check_floating(params)
        slow = jax.tree.map(zeros if slow_starts_at_zero else _copied, params)
        return LookaheadState(jnp.zeros((), jnp.int32), slow, inner.init(params))

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


def _copied(x: Any) -> Any:
    """Returns a copy in float32 or wider; for a ``jax.ShapeDtypeStruct``, one of that dtype.

    A state must not share memory with parameters, because a training step may donate both.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(
            x.shape, wide_dtype(jnp.zeros((), x.dtype)), sharding=x.sharding
        )
    return jnp.array(x, wide_dtype(x), copy=True)


def _next_step(count: jax.Array, period: int | None) -> jax.Array:
    """Count + 1; where that overflows, the number in the second period that is as far in it."""
    if period is None:
        return optax.safe_increment(count)
    last = jnp.iinfo(count.dtype).max
    # Not the first, whose synchronization may be a special one.
    back = jnp.maximum(last // period - 1, 1) * period
    return jnp.where(count < last, count + 1, last - back + 1).astype(count.dtype)
