"""Gradient accumulation: one step of an optimizer for several micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import mesh_axes
from optim_zoo.tree import Tree, check_floating, varying_axes, wide, wide_dtype
from optim_zoo.wrappers.decisions import (
    LeftOut,
    Refusals,
    all_finite,
    materialized,
    mean_loss,
    step_if,
)


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    micro_batches: jax.Array  # (), int32: seen since the last step
    steps: jax.Array  # (), int32: times that ``every`` micro-batches were seen, saturating
    skipped: LeftOut
    refusals: Refusals  # times there was nothing to make a step of
    # Sums since the last step, or up to it where no micro-batch has come since.
    weight: jax.Array  # (), float32: of the weights
    value: jax.Array  # (), float32: of weight * value, where a loss is given
    sums: Tree  # like the parameters, in float32 or wider: of weight * gradient
    inner: optax.OptState


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    skip_nonfinite: bool = True,
    max_consecutive: int = 10,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Calls ``inner`` once per ``every`` micro-batches, with the weighted mean of their gradients.

    ::

        g = sum(w_i g_i) / sum(w_i)

    ``update(g, state, params, weight=w)`` takes the mean gradient of a micro-batch and its weight,
    1 unless told: with masked tokens, their number, since a mean of means is not the mean. It is
    one number, the same on all devices. A loss given as ``value=`` is averaged alike. On the
    micro-batches between, the updates change nothing, and where the weights add up to 0 or less
    there is no step.

    ``optax.MultiSteps`` calls its inner transformation on every micro-batch, averages without
    weights, hands the mean on in the gradients' dtype, and unless told otherwise keeps a NaN for
    good. Here ``inner`` stands in one branch of a ``lax.cond``, sums and what is handed on are
    float32 or wider, and a micro-batch that is not finite, or whose loss is not, counts towards
    ``every`` and is left out; if none was finite there is no step. Under ``optax.chain``, what
    stands inside sees whole batches, what stands outside sees micro-batches.

    Args:
      inner: any transformation. Other extra arguments are those of the last micro-batch.
      every: at least 1; or a schedule: step -> micro-batches, the first step being 0.
      skip_nonfinite: False takes every gradient as it comes, and saves looking at it.
      max_consecutive: how many times in a row without a step make `guards.check` raise, at least 1.
      axis_name: under ``pmap`` and ``check_vma=False``, the mesh axes over which gradients are
        cut or differ; see `scale_by_trust_ratio`. Axes that types tell are found.

    Raises:
      ValueError: ``every`` or ``max_consecutive`` is below 1; in ``update``, a gradient has another
        shape than its parameter, the weight, the loss or what the schedule gives is not one number,
        or the weight is known to differ between devices.
      TypeError: a parameter is not floating-point; in ``update``, the inner state changes a shape
        or dtype in a step.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    if not callable(every):
        ranges.check_count("every", every, 1)
    ranges.check_count("max_consecutive", max_consecutive, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> AccumulateState:
        check_floating(params)
        mesh_axes.check_axis_matches(axis_name, params)
        zero = jnp.zeros((), jnp.int32)
        return AccumulateState(
            zero,
            jnp.copy(zero),
            LeftOut(jnp.copy(zero)),
            Refusals.none(max_consecutive),
            jnp.zeros((), jnp.float32),
            jnp.zeros((), jnp.float32),
            jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params),
            inner.init(params),
        )

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
        first = state.micro_batches == 0  # then what is summed so far is of the step before

        def added(total: jax.Array, x: jax.Array) -> jax.Array:
            # Chosen, not multiplied by 0, which a NaN would survive.
            return jnp.where(first, 0, total) + jnp.where(taken, x, 0).astype(total.dtype)

        sums = jax.tree.map(lambda total, g: added(total, w.astype(total.dtype) * g),
                            state.sums, updates)  # fmt: skip
        weights, losses = added(state.weight, w), added(state.value, w * loss)
        wanted = jnp.asarray(every(state.steps) if callable(every) else every)
        if wanted.ndim:
            raise ArgumentValueError(
                "every",
                "give one number",
                wanted,
                sentence=f"{{argument}} must give one number, got an array of shape {wanted.shape}",
            )
        due, there_is = state.micro_batches + 1 >= wanted, weights > 0

        def step() -> tuple[Tree, optax.OptState]:
            mean = jax.tree.map(lambda total: total / weights.astype(total.dtype), sums)
            given = {} if value is None else {"value": losses / weights}
            return inner.update(mean, state.inner, params, **{**extra, **given})

        before = state.skipped.micro_batches
        updates, inner_state = step_if(due & there_is, step, state.inner, sums)
        return updates, AccumulateState(
            jnp.where(due, 0, state.micro_batches + 1),
            jnp.where(due, optax.safe_increment(state.steps), state.steps),
            LeftOut(jnp.where(taken, before, optax.safe_increment(before))),
            jax.tree.map(
                lambda counted, kept: jnp.where(due, counted, kept),
                state.refusals.counted(there_is, max_consecutive),
                state.refusals,
            ),
            weights,
            losses,
            sums,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
