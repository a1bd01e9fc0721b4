"""Guards skip a step that would do harm, and count the skipped steps.

`skip_nonfinite` skips steps whose gradients are not finite. `skip_spikes` also skips steps whose
gradient norm or loss is far larger than usual. A skipped step is a no-op: it leaves the parameters
and the inner state unchanged to the last bit. Nothing can be raised inside ``jit``, so that `check`
is called on the host from time to time::

    tx = guards.skip_nonfinite(lamb(1e-3), max_consecutive=10)
    ...
    guards.check(state)  # raises where ten steps in a row were skipped
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree, promoting
from optim_zoo.wrappers.counters import SkippedSteps, all_of, check_types
from optim_zoo.wrappers.decisions import all_finite, choose_step, mean_loss

_logger = logging.getLogger(__name__)
# A norm or loss that is not known. It is no NaN, which jax_debug_nans would report.
_UNKNOWN = jnp.finfo(jnp.float32).max


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped_steps: SkippedSteps
    inner: optax.OptState


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`."""

    skipped_steps: SkippedSteps
    # (), int32: steps made; from ``window`` on, window + (steps made) % window
    made: jax.Array
    norms: jax.Array  # (window,), float32: gradient norms of the last steps that were made
    values: jax.Array  # (window,), float32: losses of these steps, `_UNKNOWN` if not passed
    inner: optax.OptState


class TooManyRefusals(RuntimeError):
    """Raised by `check` where a guard has skipped too many steps in a row.

    Args:
      in_a_row: the number of skipped steps in a row, up to the last step.
      limit: the number of them at which `check` raises: ``max_consecutive`` of the guard.
      total: the number of steps that the guard has skipped since the start.
    """

    def __init__(self, in_a_row: int, limit: int, total: int) -> None:
        super().__init__(in_a_row, limit, total)  # for `pickle` and `copy`
        self.in_a_row = in_a_row
        self.limit = limit
        self.total = total

    def __str__(self) -> str:
        return (
            f"{self.in_a_row} steps in a row were skipped, at most {self.limit - 1} are allowed "
            f"({self.total} in all): go back to a checkpoint, lower the learning rate or warm up "
            f"for longer"
        )


def skip_nonfinite(
    inner: optax.GradientTransformation,
    max_consecutive: int = 10,
    *,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips a step where a gradient, or the loss passed as ``value=``, is not finite.

    It differs from ``optax.apply_if_finite`` in two ways: a skipped step never reaches the
    parameters, however many there are in a row, and all devices decide together.

    Args:
      inner: Any transformation. On a CPU, and around `accumulate` on every device, it is in one
        branch of a ``lax.cond``. On accelerators, and inside ``shard_map`` and ``pmap``, it is
        always computed, and the result of a skipped step is not used.
      max_consecutive: The limit: the number of skipped steps in a row at which `check` raises, at
        least 1.
      axis_name: The mesh axes over which gradients are sharded or differ, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A transformation whose state is a ``SkipNonfiniteState``: the counter of skipped steps, and
      the state of ``inner``. Its ``update`` accepts the loss as ``value=``: one number, averaged
      over the devices. ``value`` and all other extra arguments are passed on to ``inner``.

    Raises:
      ArgumentValueError: ``max_consecutive`` is below 1; in ``init``, ``axis_name`` matches no
        leaf; in ``update``, ``value`` is not one number.
      ArgumentTypeError: ``inner`` is not a transformation, or ``max_consecutive`` is not a whole
        number; in ``update``, the inner state changes its structure, a shape or a dtype in a step.

    Example:
      ```python
      tx = optim_zoo.guards.skip_nonfinite(optim_zoo.lamb(1e-3), max_consecutive=5)
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> SkipNonfiniteState:
        mesh_axes.check_axis_matches(axis_name, params)
        return SkipNonfiniteState(SkippedSteps.none(max_consecutive), inner.init(params))

    @promoting
    def update(
        updates: Tree, state: SkipNonfiniteState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, SkipNonfiniteState]:
        go = all_finite(updates, axis_name)
        if extra.get("value") is not None:
            go &= all_finite(mean_loss(extra["value"], axis_name))

        def step() -> tuple[Tree, optax.OptState]:
            return inner.update(updates, state.inner, params, **extra)

        steps, inner_state = choose_step(go, step, state.inner, updates)
        skipped_steps = state.skipped_steps.after_step(go, max_consecutive)
        return steps, SkipNonfiniteState(skipped_steps, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def skip_spikes(
    inner: optax.GradientTransformation,
    window: int = 50,
    factor: float = 4.0,
    *,
    max_consecutive: int = 10,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips a step where the gradient's global norm or the loss jumps up.

    ::

        skipped where  |g|  > factor median(norms)
                or     loss > median(losses) + (factor - 1) |median(losses)|

    The medians are those of the last ``window`` steps that were made. Until ``window`` steps were
    made, nothing is compared. A step whose norm or loss is NaN or infinity is always skipped, also
    one whose norm is above 1.8e19, whose square is infinite in float32.
    Nothing is compared with a median of 0, because any step would be a jump. The norm is an extra
    pass over the gradients.

    The loss is the extra argument ``value=`` of ``update``. Without it, only the gradient's norm is
    compared: a batch whose loss jumps up is not skipped where its gradient does not, and neither is
    a loss that is not finite with finite gradients. The logger ``optim_zoo.wrappers.guards`` says
    so once, when ``update`` is first called without a loss. `optim_zoo.accumulation.accumulate`
    passes the mean loss of the micro-batches on; ``TrainState.apply_gradients`` of Flax passes no
    loss, and ``docs/flax.md`` shows a subclass that does.

    Args:
      inner: Any transformation; see `skip_nonfinite`.
      window: The number of steps to compare with, at least 2.
      factor: How many times its median a norm may be, above 1.
      max_consecutive: The limit: the number of skipped steps in a row at which `check` raises, at
        least 1.
      axis_name: The mesh axes over which gradients are sharded or differ, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A transformation whose state is a ``SkipSpikesState``: the counter of skipped steps, the norms
      and losses of the last ``window`` steps, and the state of ``inner``. Its ``update`` accepts
      the loss as ``value=``; see `skip_nonfinite`.

    Raises:
      ArgumentValueError: ``window`` is below 2, ``factor`` is not above 1, or ``max_consecutive``
        is below 1; in ``init``, ``axis_name`` matches no leaf; in ``update``, ``value`` is not one
        number.
      ArgumentTypeError: An argument has the wrong type; in ``update``, the inner state changes its
        structure, a shape or a dtype in a step.

    Example:
      ```python
      tx = optim_zoo.guards.skip_spikes(optim_zoo.lamb(1e-3), window=100, factor=3.0)
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("window", window, 2)
    ranges.check("factor", factor, 1.0, open_low=True, open_high=True)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    mesh_axes.check_axis_name(axis_name)
    log_missing_loss_once = functools.cache(_log_missing_loss)

    def init(params: Tree) -> SkipSpikesState:
        mesh_axes.check_axis_matches(axis_name, params)
        unknown = jnp.full(window, _UNKNOWN, jnp.float32)
        return SkipSpikesState(
            SkippedSteps.none(max_consecutive),
            jnp.zeros((), jnp.int32),
            unknown,
            jnp.copy(unknown),
            inner.init(params),
        )

    @promoting
    def update(
        updates: Tree, state: SkipSpikesState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, SkipSpikesState]:
        norm = norms.global_norm(updates, axis_name, whole_range=False).astype(jnp.float32)
        value = extra.get("value")
        if value is None:
            log_missing_loss_once()
        loss = jnp.full_like(norm, _UNKNOWN) if value is None else mean_loss(value, axis_name)
        warm = state.made >= window
        usual_norm, usual_loss = _median(state.norms), _median(state.values)
        largest = jnp.finfo(jnp.float32).max  # a number that is not finite is above it
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
            state.skipped_steps.after_step(go, max_consecutive),
            jnp.where(go, made, state.made),
            remembered(state.norms, norm),
            remembered(state.values, loss),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _median(history: jax.Array) -> jax.Array:
    """Returns the median of the known entries, or 0 if there are none."""
    known = jnp.sum(history < _UNKNOWN)
    ordered = jnp.sort(history)
    middle = ordered[jnp.maximum(jnp.stack([known - 1, known]) // 2, 0)]
    return jnp.where(known > 0, 0.5 * middle[0] + 0.5 * middle[1], 0)


def _log_missing_loss() -> None:
    _logger.warning(
        "skip_spikes was called without a loss: it compares gradient norms only, and does not see "
        "a loss that jumps up or is not finite. Pass the loss to update as value="
    )


def check(state: Tree) -> None:
    """Raises where a guard in ``state`` has skipped too many steps in a row.

    It also raises where `optim_zoo.accumulation.accumulate` could not make a step that many times
    in a row. It runs on the host and waits for the step that returned ``state``: call it as often
    as metrics are logged. Where no guard is in ``state``, it returns.

    Args:
      state: The state of an optimizer, or any tree that holds one: a ``TrainState``, an
        ``nnx.Optimizer`` or its ``opt_state``, or a state that is replicated for ``jax.pmap``.

    Raises:
      TooManyRefusals: A guard has skipped ``max_consecutive`` steps in a row, or more.
      ArgumentTypeError: ``state`` is traced, or it has lost its types, as in a checkpoint that was
        restored without a target, which `optim_zoo.saved_state.rebuild` repairs.
    """
    counters = all_of(SkippedSteps, state)
    if not counters:
        check_types("guards.check", state, [SkippedSteps])
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(counters)):
        advice = "call it outside jit, on the state it returns"
        raise ArgumentTypeError(
            "state",
            "hold numbers",
            "a traced state",
            advice,
            sentence=f"guards.check reads numbers: {advice}",
        )
    for skipped in jax.device_get(counters):
        if (skipped.in_a_row >= skipped.limit).any():  # several values under pmap
            counts = (skipped.in_a_row, skipped.limit, skipped.total)
            raise TooManyRefusals(*(int(count.max()) for count in counts))
