"""Weight decay at the places where ports need it: before a step, after it, or under a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rules
from optim_zoo.errors import parameters_missing
from optim_zoo.ports._arguments import Rate, is_zero
from optim_zoo.ports._pieces import at
from optim_zoo.transforms import add_decayed_weights
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise
from optim_zoo.tree import Tree, wide


class ScheduledDecayState(NamedTuple):
    """State of `add_scheduled_decay`."""

    step: jax.Array  # (), int32: steps made, saturating


def add_scheduled_decay(weight_decay: Rate, exclude: rules.Patterns = ()) -> Leafwise:
    """Returns `add_decayed_weights`, whose ``weight_decay`` may also be a schedule.

    Args:
      weight_decay: a number >= 0, or a schedule: step -> weight decay, the first step being 0.
      exclude: path patterns of leaves that are not decayed.
    """
    if not callable(weight_decay):
        return add_decayed_weights(weight_decay, exclude)
    rules.check_patterns("exclude_from_weight_decay", exclude)

    def begin(state: ScheduledDecayState) -> tuple[ScheduledDecayState, Any]:
        return ScheduledDecayState(optax.safe_increment(state.step)), weight_decay(state.step)

    def update(
        u: jax.Array, state: ScheduledDecayState, leaf: Leaf
    ) -> tuple[jax.Array, ScheduledDecayState]:
        if rules.matches(exclude, leaf.path):
            return u, state
        x = wide(leaf.parameter)
        return wide(u) + jnp.asarray(leaf.shared * x, x.dtype), state

    return leafwise(
        Declaration(
            name="add_scheduled_decay",
            update=update,
            state=ScheduledDecayState,
            init_shared=lambda: {"step": jnp.zeros((), jnp.int32)},
            begin=begin,
            check=lambda params: rules.check_matches("exclude_from_weight_decay", exclude, params),
            params="required",
        )
    )


class DecayState(NamedTuple):
    """State of `decay_before` and `decay_after`."""

    step: jax.Array  # (), int32: steps made, saturating
    inner: Any  # the state of the inner optimizer


def decay_before(
    inner: optax.GradientTransformation, fraction: Rate | None, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
    """Decays x to (1 - fraction) x, and then takes the inner optimizer's step from there.

    Args:
      inner: the optimizer; it sees the decayed parameters.
      fraction: a number or a schedule; None or the number 0 returns ``inner`` unchanged.
      exclude: path patterns of leaves that are not decayed.
    """

    def combine(x: jax.Array, u: jax.Array, f: Any) -> jax.Array:
        return u - f * wide(x)

    return _decay(inner, fraction, exclude, before=True, combine=combine)


def decay_after(
    inner: optax.GradientTransformation, fraction: Rate | None, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
    """Takes the inner optimizer's step, then decays x to (1 - fraction) x; see `decay_before`."""

    def combine(x: jax.Array, u: jax.Array, f: Any) -> jax.Array:
        return wide(u) - f * (wide(x) + u)

    return _decay(inner, fraction, exclude, before=False, combine=combine)


def _decay(
    inner: optax.GradientTransformation,
    fraction: Rate | None,
    exclude: rules.Patterns,
    *,
    before: bool,
    combine: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> optax.GradientTransformation:
    rules.check_patterns("exclude_from_weight_decay", exclude)
    if fraction is None or is_zero(fraction):
        return inner

    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> DecayState:
        rules.check_matches("exclude_from_weight_decay", exclude, params)
        return DecayState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Tree, state: DecayState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, DecayState]:
        if params is None:
            raise parameters_missing("weight decay")
        f = at(fraction, state.step)
        excluded = rules.mask(exclude, params)
        seen = params
        if before:
            seen = jax.tree.map(lambda x, skip: x if skip else wide(x) * (1 - f), params, excluded)
        steps, inner_state = inner.update(updates, state.inner, seen, **extra)
        steps = jax.tree.map(
            lambda u, x, skip: (u if skip else combine(x, u, f)).astype(x.dtype),
            steps,
            params,
            excluded,
        )
        return steps, DecayState(optax.safe_increment(state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def times(rate: Rate, factor: float | None) -> Rate:
    """Returns the rate times ``factor``; 0 where ``factor`` is None or 0."""
    if factor is None or is_zero(factor):
        return 0.0
    return (lambda count: rate(count) * factor) if callable(rate) else rate * factor
