"""What a step did: learning rate, norms and trust ratios of every layer.

The pieces of this library keep what they computed anyway, and `read` finds it in the state of any
optimizer made of them, at no cost. `with_metrics` adds the norms that no piece has computed::

    tx = metrics.with_metrics(adamw(1e-3), every=10)
    ...
    metrics.read(state)["update_norm/encoder/layer_0/attention/query/kernel"]
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentValueError, parameters_missing
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.transforms import (
    ClipByGlobalNormState,
    ScaleByLarsTrustRatioState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
)
from optim_zoo.tree import Tree, by_path, leaf_paths, leaves_with_path, map_with_path
from optim_zoo.wrappers.decisions import LeftOut, Refusals, all_of, traced_once


class WithMetricsState(NamedTuple):
    """State of `with_metrics`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: updates made, modulo ``every``
    # The rest is of the last update whose norms were taken, float32.
    gradient_norm: Any  # (); None where the inner state has it
    # Dicts from the path of each leaf without a trust ratio to (); a zero where there is no leaf.
    parameter_norm: Tree  # before the step
    update_norm: Tree  # of the updates handed on
    inner: optax.OptState


_READ = (
    ClipByGlobalNormState,
    ScaleByLarsTrustRatioState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
    WithMetricsState,
)


def with_metrics(
    inner: optax.GradientTransformation, every: int = 1, *, axis_name: mesh_axes.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps norms of what ``inner`` was given and gave, for `read`.

    Of leaves under layer adaptation everything is in the state of ``inner`` already, and the norm
    of the gradients where `clip_by_global_norm` stands in front. For other leaves the norms of
    parameters and updates are extra passes over them, as is that of the gradients. A step of AdamW
    in float32, which moves 28 bytes a parameter on a TPU, moves 40 with them, and 44 where they are
    made every so many updates; between, `read` gives the last ones and the step is as without. On a
    CPU they are computed on every update, and take about as long as the step. It goes inside
    `accumulate`: outside, an update is a micro-batch, and most of them change nothing.

    Args:
      inner: any transformation; its updates and its part of the state are as without this.
      every: at least 1.
      axis_name: see `scale_by_trust_ratio`.

    Raises:
      ArgumentValueError: ``every`` is below 1; in ``update``, the parameters are missing.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("every", every, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> WithMetricsState:
        mesh_axes.check_axis_matches(axis_name, params)
        state = inner.init(params)
        known = read(state)
        zeros: Tree = {
            path: jnp.zeros((), jnp.float32)
            for path in leaf_paths(params)
            if f"update_norm/{path}" not in known
        }
        if not jax.tree.leaves(params):  # see `leafwise`: optax.tree.map_params needs a leaf
            zeros = jnp.zeros((), jnp.float32)
        return WithMetricsState(
            jnp.zeros((), jnp.int32),
            None if "gradient_norm" in known else jnp.zeros((), jnp.float32),
            zeros,
            jax.tree.map(jnp.copy, zeros),
            state,
        )

    def update(
        updates: Tree, state: WithMetricsState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WithMetricsState]:
        if params is None:
            raise parameters_missing("with_metrics")
        due = state.count % every == 0
        branches = every > 1 and isinstance(due, jax.core.Tracer)

        def step() -> tuple[Tree, optax.OptState]:
            return inner.update(updates, state.inner, params, **extra)

        if branches:
            step = traced_once(step)
        steps, inner_state = step()

        def taken(steps: Tree) -> tuple[Any, ...]:
            gradient_norm = state.gradient_norm
            if gradient_norm is not None:
                gradient_norm = norms.global_norm(updates, axis_name).astype(jnp.float32)
            return gradient_norm, norms_by_path(params), norms_by_path(steps)

        def norms_by_path(tree: Tree) -> dict[str, jax.Array]:
            def of_leaf(path: str, x: jax.Array, names: tuple[str, ...]) -> jax.Array | None:
                if path not in state.update_norm:
                    return None
                return norms.norm(x, (), names).astype(jnp.float32)

            arrays = rows.summed(tree)
            names = mesh_axes.assign_axis_names(axis_name, arrays)
            return by_path(map_with_path(of_leaf, arrays, names))

        kept = (state.gradient_norm, state.parameter_norm, state.update_norm)

        def branch() -> tuple[Any, ...]:
            # Of steps computed once more, since those handed on would have to be written to memory
            # for the branch on every update, when else the addition to the parameters fuses.
            def again() -> tuple[Any, ...]:
                return taken(step()[0])

            return jax.lax.cond(due, again, lambda: kept)

        def chosen() -> tuple[Any, ...]:
            return jax.tree.map(lambda new, old: jnp.where(due, new, old), taken(steps), kept)

        if not jax.tree.leaves(params):
            seen = kept
        elif every == 1:
            seen = taken(steps)
        elif not branches:  # outside jit each branch would be compiled
            seen = chosen()
        else:  # A CPU would copy the state for such a branch.
            seen = jax.lax.platform_dependent(cpu=chosen, default=branch)
        count = (state.count + 1) % every
        return steps, WithMetricsState(count, seen[0], seen[1], seen[2], inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def read(state: Tree) -> dict[str, jax.Array]:
    """Learning rate, norms and trust ratios of the step just made, out of optimizer state.

    ``learning_rate``; ``gradient_norm`` (before clipping) and ``clipped_gradient_norm``, shape
    ``()``; and of every leaf under layer adaptation ``trust_ratio/<path>``,
    ``parameter_norm/<path>`` (before the step) and ``update_norm/<path>`` (of the direction the
    ratio scaled), shape ``()``, or ``(layers,)`` where the leaf holds several layers; with
    `with_metrics`, parameter and update norm of the other leaves too, the latter of the whole step.
    ``skipped_steps``, (), int32, where there is a guard or an accumulation: steps that were not
    made, and ``skipped_micro_batches`` that were left out of a mean, up to now. Nothing is
    computed: a key is there where a piece of this library kept the value. Works on traced state, so
    that a jitted step can return it, and on the ``opt_state`` of an ``nnx.Optimizer``. Of a state
    replicated for ``jax.pmap`` every value has a leading axis, one entry per device.

    Raises:
      ArgumentValueError: two pieces kept the same value, such as the rates of two groups of
        parameters.
    """
    metrics: dict[str, jax.Array] = {}

    def add(name: str, value: Tree) -> None:
        if name in metrics:
            advice = "read each part of it alone"
            raise ArgumentValueError(
                "state",
                "hold every value once",
                name,
                advice,
                sentence=f"the {{argument}} holds several values of {name}: {advice}",
            )
        metrics[name] = _array(value)

    def add_leaves(name: str, values: Tree) -> None:
        for path, value in leaves_with_path(values):
            add(f"{name}/{path}", value)

    for piece in _pieces(state):
        match piece:
            case ScaleByLearningRateState():
                add("learning_rate", piece.rate)
            case ClipByGlobalNormState():
                add("gradient_norm", piece.gradient_norm)
                add("clipped_gradient_norm", piece.clipped_norm)
            # There is no dict where there is no leaf.
            case (
                ScaleByTrustRatioState(trust_ratio=dict())
                | ScaleByLarsTrustRatioState(trust_ratio=dict())
            ):
                for field, values in piece._asdict().items():
                    add_leaves(field, values)
            case WithMetricsState():
                if piece.gradient_norm is not None:
                    add("gradient_norm", piece.gradient_norm)
                if isinstance(piece.update_norm, dict):
                    add_leaves("parameter_norm", piece.parameter_norm)
                    add_leaves("update_norm", piece.update_norm)
    counted = {
        "skipped_steps": [refusals.total for refusals in all_of(Refusals, state)],
        "skipped_micro_batches": [left_out.micro_batches for left_out in all_of(LeftOut, state)],
    }
    for name, counts in counted.items():
        if counts:
            metrics[name] = sum(counts[1:], counts[0])
    return metrics


def _pieces(state: Tree) -> Iterator[Any]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _READ))
    for leaf in leaves:
        if isinstance(leaf, _READ):
            yield leaf
        if isinstance(leaf, WithMetricsState):
            yield from _pieces(leaf.inner)


def _array(x: Tree) -> jax.Array:
    """``x``, or what it holds: an ``nnx.Optimizer`` keeps each array of its state in a variable."""
    (array,) = jax.tree.leaves(x)
    return array
