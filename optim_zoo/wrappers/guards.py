"""Guards: a step that would do harm is refused, and counted.

``skip_nonfinite`` refuses gradients that are not finite, ``skip_spikes`` those far out of the
ordinary. A refused step leaves parameters and inner state untouched to the last bit, as if it had
not been. Inside ``jit`` nothing can be raised, so `check` is called now and then on the host::

    tx = guards.skip_nonfinite(lamb(1e-3), max_consecutive=10)
    ...
    guards.check(state)  # raises once ten steps in a row were refused
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree
from optim_zoo.wrappers.decisions import Refusals, all_finite, all_of, choose_step, mean_loss


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    refusals: Refusals
    inner: optax.OptState


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`."""

    refusals: Refusals
    # (), int32: steps made; from ``window`` on, window + (steps made) % window
    made: jax.Array
    norms: jax.Array  # (window,), float32: of the last gradients that were let through
    values: jax.Array  # (window,), float32: and their losses, NaN where none was given
    inner: optax.OptState


class TooManyRefusals(RuntimeError):
    """A guard has refused as many steps in a row as make `check` raise.

    Args:
      in_a_row: the steps in a row that were refused, up to the last one.
      limit: the number of them at which `check` raises: ``max_consecutive`` of the guard.
      total: the steps that the guard has refused since the start.
    """

    def __init__(self, in_a_row: int, limit: int, total: int) -> None:
        super().__init__(in_a_row, limit, total)  # for `pickle` and `copy`
        self.in_a_row = in_a_row
        self.limit = limit
        self.total = total

    def __str__(self) -> str:
        return (
            f"{self.in_a_row} steps in a row were refused, at most {self.limit - 1} are allowed "
            f"({self.total} in all): go back to a checkpoint, lower the learning rate or warm up "
            f"for longer"
        )


def skip_nonfinite(
    inner: optax.GradientTransformation,
    max_consecutive: int = 10,
    *,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes no step where a gradient, or the loss given as ``value=``, is not finite.

    As ``optax.apply_if_finite``, but a refused step never reaches the parameters however many
    there are, and devices decide together.

    Args:
      inner: any transformation. On a CPU, and around `accumulate` on every device, it is one branch
        of a ``lax.cond``. Elsewhere, and inside ``shard_map`` and ``pmap``, it is always computed,
        and a refused step is not taken.
      max_consecutive: how many refusals in a row make `check` raise, at least 1.
      axis_name: under ``pmap`` and ``check_vma=False``, the mesh axes over which gradients are
        cut or differ; see `scale_by_trust_ratio`. Axes that types tell are found.

    Raises:
      ArgumentValueError: ``max_consecutive`` is below 1; in ``update``, ``value`` is not one
        number.
      ArgumentTypeError: ``max_consecutive`` is not a whole number; in ``update``, the inner state
        changes a shape or dtype in a step.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> SkipNonfiniteState:
        mesh_axes.check_axis_matches(axis_name, params)
        return SkipNonfiniteState(Refusals.none(max_consecutive), inner.init(params))

    def update(
        updates: Tree, state: SkipNonfiniteState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, SkipNonfiniteState]:
        go = all_finite(updates, axis_name)
        if extra.get("value") is not None:
            go &= all_finite(mean_loss(extra["value"], axis_name))

        def step() -> tuple[Tree, optax.OptState]:
            return inner.update(updates, state.inner, params, **extra)

        steps, inner_state = choose_step(go, step, state.inner, updates)
        refusals = state.refusals.counted(go, max_consecutive)
        return steps, SkipNonfiniteState(refusals, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def skip_spikes(
    inner: optax.GradientTransformation,
    window: int = 50,
    factor: float = 4.0,
    *,
    max_consecutive: int = 10,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes no step where the gradient's global norm or the loss jumps up.

    ::

        refused where  |g| > factor median(norms)
        or             value > median(values) + (factor - 1) |median(values)|

    over the last ``window`` steps that were made. Until there were so many, and ever after, a norm
    or ``value=`` that is not finite is refused. With a median of 0 nothing else is: any step would
    be a jump. The norm is an extra pass over the gradients.

    Args:
      inner, max_consecutive, axis_name: see `skip_nonfinite`.
      window: steps to compare with, at least 2.
      factor: above 1; so many times the median is refused.

    Raises:
      ValueError: an argument is out of range; see `skip_nonfinite`.
      TypeError: see `skip_nonfinite`.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("window", window, 2)
    ranges.check("factor", factor, 1.0, open_low=True, open_high=True)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> SkipSpikesState:
        mesh_axes.check_axis_matches(axis_name, params)
        unknown = jnp.full(window, jnp.nan, jnp.float32)
        return SkipSpikesState(
            Refusals.none(max_consecutive),
            jnp.zeros((), jnp.int32),
            unknown,
            jnp.copy(unknown),
            inner.init(params),
        )

    def update(
        updates: Tree, state: SkipSpikesState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, SkipSpikesState]:
        norm = norms.global_norm(updates, axis_name).astype(jnp.float32)
        value = extra.get("value")
        loss = jnp.full_like(norm, jnp.nan) if value is None else mean_loss(value, axis_name)
        warm = state.made >= window
        usual_norm, usual_loss = jnp.nanmedian(state.norms), jnp.nanmedian(state.values)
        largest = jnp.finfo(jnp.float32).max  # so that what is not finite is above it
        most_norm = jnp.where(warm & (usual_norm != 0), factor * usual_norm, largest)
        rise = usual_loss + (factor - 1) * jnp.abs(usual_loss)
        compared = warm & (usual_loss != 0) & jnp.isfinite(rise)
        most_loss = jnp.where(compared, rise, largest)
        go = norm <= jnp.minimum(most_norm, largest)
        if value is not None:
            go &= loss <= most_loss

        def step() -> tuple[Tree, optax.OptState]:
            return inner.update(updates, state.inner, params, **extra)

        steps, inner_state = choose_step(go, step, state.inner, updates)
        at = state.made % window
        made = jnp.where(warm, window + (at + 1) % window, state.made + 1)

        def remembered(history: jax.Array, seen: jax.Array) -> jax.Array:
            return jnp.where(go, history.at[at].set(seen), history)

        return steps, SkipSpikesState(
            state.refusals.counted(go, max_consecutive),
            jnp.where(go, made, state.made),
            remembered(state.norms, norm),
            remembered(state.values, loss),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def check(state: Tree) -> None:
    """Raises where a guard in ``state`` has refused too many steps in a row; called on the host.

    Also where `accumulate` could not make so many. It waits for the step that made ``state``, so
    call it as often as metrics are logged. ``state`` may be replicated for ``jax.pmap``, or be the
    ``opt_state`` of an ``nnx.Optimizer``.

    Raises:
      TooManyRefusals: a guard has refused ``max_consecutive`` steps in a row, or more.
      ArgumentTypeError: ``state`` is traced, or a guard in it has lost its type, as in a checkpoint
        that is restored without a target.
    """
    guarded = all_of(Refusals, state)
    if not guarded and _has_untyped_guard(state):
        expected = "have the types that init gave it"
        advice = (
            "rebuild it with saved_state.rebuild(tx.init(params), state), or pass "
            "optimizer.opt_state instead of nnx.state(optimizer)"
        )
        raise ArgumentTypeError(
            "state",
            expected,
            "dictionaries",
            advice,
            sentence=f"guards.check finds guards by the types of their states, got a state made of "
            f"dictionaries: {advice}",
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(guarded)):
        advice = "call it outside jit, on the state it returns"
        raise ArgumentTypeError(
            "state",
            "hold numbers",
            "a traced state",
            advice,
            sentence=f"guards.check reads numbers: {advice}",
        )
    for refusals in jax.device_get(guarded):
        if (refusals.in_a_row >= refusals.most).any():  # several values under pmap
            counts = (refusals.in_a_row, refusals.most, refusals.total)
            raise TooManyRefusals(*(int(count.max()) for count in counts))


def _has_untyped_guard(state: Tree) -> bool:
    def is_guard(node: Any) -> bool:
        return isinstance(node, Mapping) and set(node) == set(Refusals._fields)

    return any(map(is_guard, jax.tree.leaves(state, is_leaf=is_guard)))
