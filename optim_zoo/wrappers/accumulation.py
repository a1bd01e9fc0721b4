"""Gradient accumulation: one step of an optimizer for several micro-batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.layers import mesh_axes
from optim_zoo.tree import Tree, check_floating, promoting, varying_axes, wide, wide_dtype
from optim_zoo.wrappers import noise_scale as noise
from optim_zoo.wrappers.counters import SkippedMicroBatches, SkippedSteps, check_types
from optim_zoo.wrappers.decisions import all_finite, cast_like, materialized, mean_loss, step_if
from optim_zoo.wrappers.guards import SkipNonfiniteState, SkipSpikesState
from optim_zoo.wrappers.precision.masters import MasterWeightsState
from optim_zoo.wrappers.precision.narrow import is_narrow
from optim_zoo.wrappers.precision.rounding import StochasticRoundingState
from optim_zoo.wrappers.precision.storage import StoreStateState


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    micro_batches: jax.Array  # (), int32: received since the last step
    steps: jax.Array  # (), int32: times that ``every`` micro-batches were received, saturating
    skipped_micro_batches: SkippedMicroBatches
    skipped_steps: SkippedSteps  # where the weights added up to 0 or less
    # The sums since the last step; those of the last step where no micro-batch came since.
    weight: jax.Array  # (), float32: sum of weight
    value: jax.Array  # (), float32: sum of weight * value, 0 where no loss is passed
    sums: Tree  # like the parameters, in float32 or wider: sum of weight * gradient
    inner: optax.OptState  # in a `metrics.NoiseScaleState` with ``noise_scale=True``


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    skip_nonfinite: bool = True,
    max_consecutive: int = 10,
    noise_scale: bool = False,
    noise_decay: float = 0.99,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Calls ``inner`` once for ``every`` micro-batches, with the weighted mean of their gradients.

    ::

        g = sum(w_i g_i) / sum(w_i)

    ``update(g, state, params, weight=w)`` takes the mean gradient of one micro-batch and its
    weight: with masked tokens, the number of tokens that count, because a mean of means is not the
    mean. The updates of all micro-batches but the last are no-ops. `has_updated` returns whether a
    step was made.

    **The end of an epoch.** Where fewer than ``every`` micro-batches are left, fill up with
    micro-batches of ``weight=0``: they count towards ``every`` and are left out of the mean, so
    that the step is made with the mean of the real ones. Their gradient does not matter and may be
    NaN. Without them, the sums are kept and completed by the first micro-batches of the next epoch.
    Where all weights of a step are 0, the step is skipped.

    It differs from ``optax.MultiSteps``, which calls its inner transformation with every
    micro-batch, has no weights, passes the mean on in the dtype of the gradients, and by default
    keeps a NaN for good. Here ``inner`` is in one branch of a ``lax.cond``; the sums, and the mean
    that is passed on, are float32 or wider. A micro-batch whose gradient, weight or loss is not
    finite counts towards ``every`` and is left out of the mean; if none was finite, the step is
    skipped. Under ``optax.chain``, the pieces inside see whole batches and the pieces outside see
    micro-batches.

    The state of ``inner`` keeps its dtypes. Arrays of bfloat16 or float16 in it are converted to
    float32 for the step, and rounded to their dtype afterwards. Most of optax's transformations
    have a state in the dtype of the parameters; where that is the case, ``inner`` also receives the
    parameters in float32, like the mean gradient. A second moment may then stall, as it does
    without accumulation; `optim_zoo.precision.master_weights` around ``inner`` keeps a float32
    state instead.

    Args:
      inner: Any transformation. The loss that it receives as ``value=`` is the weighted mean of the
        losses; other extra arguments are those of the last micro-batch.
      every: The number of micro-batches of a step, at least 1; or a schedule: a function from the
        step to the number of micro-batches, where the first step is 0.
      skip_nonfinite: If False, every gradient is added unchecked, which saves a pass over it.
      max_consecutive: The limit: the number of skipped steps in a row at which
        `optim_zoo.guards.check` raises, at least 1.
      noise_scale: If True, the gradient noise scale (arXiv 1812.06162) is measured from the
        gradients of the micro-batches, and `optim_zoo.metrics.read` returns it as
        ``gradient_noise_scale``; the formula is there. It costs one pass over each gradient. A
        micro-batch that is left out, or whose weight is 0, does not count, nor does a step with
        fewer than two others.
      noise_decay: The decay rate, for each step, of the averages behind the noise scale, in
        [0, 1). They cover about ``1 / (1 - noise_decay)`` steps.
      axis_name: The mesh axes over which gradients are sharded or differ, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``. With ``noise_scale``,
        gradients must be averaged over the axes that they are not sharded over.

    Returns:
      A transformation whose state is an ``AccumulateState``: counters, the sums, which are like the
      parameters in float32 or wider, and the state of ``inner``. Its ``update`` accepts
      ``weight=``, one number that is the same on all devices, by default 1, and ``value=``, the
      mean loss of the micro-batch.

    Raises:
      ArgumentValueError: ``every`` or ``max_consecutive`` is below 1, ``noise_decay`` is outside
        its range, or ``noise_scale`` is True and ``every`` is 1; in ``init``, ``axis_name`` matches
        no leaf; in ``update``, a gradient has another shape than its parameter, the weight, the
        loss or the result of the schedule is not one number, or the type of the weight (with
        ``noise_scale``, also of a gradient) shows that it differs between devices.
      ArgumentTypeError: ``inner`` is not a transformation, ``every`` or ``max_consecutive`` is not
        a whole number, or ``noise_decay`` is not a number; in ``init``, a parameter is not
        floating-point; in ``update``, the inner state changes its structure or a shape in a step.

    Example:
      ```python
      tx = optim_zoo.accumulation.accumulate(optim_zoo.lamb(1e-3), every=4)
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    if not callable(every):
        ranges.check_count("every", every, 1)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    ranges.check_decay("noise_decay", noise_decay)
    mesh_axes.check_axis_name(axis_name)
    if noise_scale:
        if not callable(every) and every == 1:
            raise noise.one_micro_batch("pass every=2 or more")
        inner = noise.with_noise_scale(inner, noise_decay, axis_name=axis_name)

    def init(params: Tree) -> AccumulateState:
        check_floating(params)
        mesh_axes.check_axis_matches(axis_name, params)
        zero = jnp.zeros((), jnp.int32)
        return AccumulateState(
            micro_batches=zero,
            steps=jnp.copy(zero),
            skipped_micro_batches=SkippedMicroBatches(jnp.copy(zero)),
            skipped_steps=SkippedSteps.none(max_consecutive),
            weight=jnp.zeros((), jnp.float32),
            value=jnp.zeros((), jnp.float32),
            sums=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params),
            inner=inner.init(params),
        )

    @promoting
    def update(
        updates: Tree,
        state: AccumulateState,
        params: Tree | None = None,
        *,
        weight: jax.typing.ArrayLike = 1.0,
        **extra: Any,
    ) -> tuple[Tree, AccumulateState]:
        rows.check_updates("accumulate", updates, state.sums)
        w = wide(weight).astype(jnp.float32)
        if w.ndim:
            raise ranges.several_numbers("weight", weight)
        if varying_axes(w):
            axes, advice = sorted(varying_axes(w)), "add it up over them first (jax.lax.psum)"
            raise ArgumentValueError(
                "weight",
                "be the same on every device",
                axes,
                advice,
                sentence=f"{{argument}} varies over the mesh axes {axes}: {advice}",
            )
        value = extra.get("value")
        loss = jnp.zeros((), jnp.float32) if value is None else mean_loss(value, axis_name)
        taken = jnp.bool_(True)
        if skip_nonfinite:
            taken = materialized(all_finite(updates, axis_name) & all_finite((w, loss)))
        first = state.micro_batches == 0  # The sums are then those of the last step.

        def added(total: jax.Array, x: jax.Array) -> jax.Array:
            # Selected, because NaN * 0 is NaN.
            return jnp.where(first, 0, total) + jnp.where(taken, x, 0).astype(total.dtype)

        sums = jax.tree.map(lambda total, g: added(total, w.astype(total.dtype) * g),
                            state.sums, updates)  # fmt: skip
        weights, losses = added(state.weight, w), added(state.value, w * loss)
        number = jnp.asarray(every(state.steps) if callable(every) else every)
        if number.ndim:
            raise ArgumentValueError(
                "every",
                "give one number",
                number,
                sentence=f"{{argument}} must give one number, got an array of shape {number.shape}",
            )
        due, weighted = state.micro_batches + 1 >= number, weights > 0
        inner_state = state.inner
        if noise_scale:
            spread = noise.spread_of(updates, w, params, axis_name)
            spread = jax.tree.map(added, inner_state.spread, spread)
            inner_state = inner_state._replace(spread=spread)

        def step() -> tuple[Tree, optax.OptState]:
            mean = jax.tree.map(lambda total: total / weights.astype(total.dtype), sums)
            loss = {} if value is None else {"value": losses / weights}
            before = jax.tree.map(_widened, inner_state)
            like = jax.tree.map(_widened, params) if _follows_parameters(inner_state) else params
            steps, after = inner.update(mean, before, like, **{**extra, **loss})
            return steps, cast_like(after, inner_state)

        skipped = state.skipped_micro_batches.total
        updates, after = step_if(due & weighted, step, inner_state, sums)
        return updates, AccumulateState(
            micro_batches=jnp.where(due, 0, state.micro_batches + 1),
            steps=jnp.where(due, optax.safe_increment(state.steps), state.steps),
            skipped_micro_batches=SkippedMicroBatches(
                jnp.where(taken, skipped, optax.safe_increment(skipped))
            ),
            skipped_steps=jax.tree.map(
                lambda after, before: jnp.where(due, after, before),
                state.skipped_steps.after_step(weighted, max_consecutive),
                state.skipped_steps,
            ),
            weight=weights,
            value=losses,
            sums=sums,
            inner=after,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _follows_parameters(state: Tree) -> bool:
    """Returns whether arrays of ``state`` have a low precision that is that of the parameters.

    It is not where a wrapper chose the precision. These wrappers also have to receive the
    parameters in low precision, because they round them.
    """
    chosen = (MasterWeightsState, StochasticRoundingState, StoreStateState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, chosen))
    return not any(isinstance(node, chosen) for node in nodes) and any(map(is_narrow, nodes))


def _widened(x: jax.Array) -> jax.Array:
    return wide(x) if is_narrow(x) else x


def has_updated(state: Tree) -> jax.Array:
    """Returns whether the last call of ``update`` made a step of ``inner``: (), bool.

    It is False before the first step, between steps, where the step was skipped, and where a guard
    outside `accumulate` skipped the call. A guard inside may still have skipped the step.

    Args:
      state: The state of `accumulate`, or any tree that holds one, such as the state of a chain, a
        ``TrainState``, or the ``opt_state`` of an ``nnx.Optimizer``. It may be traced. Where it
        holds several, as in parameter groups, the result is True if any of them made a step. Where
        it is replicated for ``jax.pmap``, the result has one entry for each device.

    Returns:
      True or False as an array: (), bool.

    Raises:
      ArgumentTypeError: There is no accumulation in ``state``, or ``state`` has lost its types, as
        in a checkpoint that was restored without a target.

    Example:
      ```python
      updates, state = tx.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
      steps += accumulation.has_updated(state)
      ```
    """
    made = _steps_made(state)
    if made:
        return functools.reduce(jnp.logical_or, made)
    check_types("accumulation.has_updated", state, [AccumulateState])
    expected = "hold the state of accumulate"
    raise ArgumentTypeError("state", expected, type(state).__name__)


def _steps_made(state: Tree) -> list[jax.Array]:
    """Returns whether a step was made, for each of the outermost accumulations in ``state``."""
    kinds = (AccumulateState, SkipNonfiniteState, SkipSpikesState)
    made = []
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if not isinstance(node, kinds):
            continue
        # An ``nnx.Optimizer`` stores each array in a variable.
        not_skipped = jax.tree.leaves(node.skipped_steps.in_a_row)[0] == 0
        if isinstance(node, AccumulateState):
            micro_batches, steps = jax.tree.leaves((node.micro_batches, node.steps))
            made.append((micro_batches == 0) & (steps > 0) & not_skipped)
        else:
            made += [inner & not_skipped for inner in _steps_made(node.inner)]
    return made
