"""Norms that are computed in the step and kept in the state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import parameters_missing
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree, by_path, leaf_paths, map_with_path, promoting
from optim_zoo.wrappers.decisions import traced_once
from optim_zoo.wrappers.metrics.state import WithMetricsState, figures


def with_metrics(
    inner: optax.GradientTransformation, every: int = 1, *, axis_name: mesh_axes.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norms of gradients, parameters and updates around ``inner``, for `read`.

    Norms that the state of ``inner`` already holds are not computed again: those of layer-adapted
    leaves, and that of the gradients where `clip_by_global_norm` is in front of the other pieces.
    Every other norm is an extra pass over an array. In float32 a step of AdamW on a TPU moves 28
    bytes for each parameter without them, 40 with them, and 44 in a step that computes them where
    ``every`` is above 1; in between, `read` returns the last norms and the step costs nothing
    extra. On a CPU the norms are computed in every update, and take about as long as the step.

    Put it inside `optim_zoo.accumulation.accumulate`: outside, every update is a micro-batch, and
    most of them change nothing.

    Args:
      inner: Any transformation. Its updates, and its part of the state, are unchanged.
      every: The number of updates from one computation of the norms to the next, at least 1.
      axis_name: The mesh axes over which leaves are sharded, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A transformation whose state is a ``WithMetricsState``: a count of updates, the norms, and the
      state of ``inner``. It passes all extra arguments on to ``inner``.

    Raises:
      ArgumentValueError: ``every`` is below 1; in ``init``, ``axis_name`` matches no leaf; in
        ``update``, the parameters are missing.
      ArgumentTypeError: ``inner`` is not a transformation, or ``every`` is not a whole number.

    Example:
      ```python
      tx = optim_zoo.metrics.with_metrics(optim_zoo.adamw(1e-3), every=10)
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    ranges.check_count("every", every, 1)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> WithMetricsState:
        mesh_axes.check_axis_matches(axis_name, params)
        state = inner.init(params)
        known = {name for name, group, _ in figures(state) if group == () or "/" in name}
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

    @promoting
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
            # The branch computes the step again. Updates that it read would have to be written to
            # memory in every step, while otherwise they are added to the parameters in one kernel.
            def again() -> tuple[Any, ...]:
                return taken(step()[0])

            return jax.lax.cond(due, again, lambda: kept)

        def chosen() -> tuple[Any, ...]:
            return jax.tree.map(lambda new, old: jnp.where(due, new, old), taken(steps), kept)

        if not jax.tree.leaves(params):
            seen = kept
        elif every == 1:
            seen = taken(steps)
        elif not branches:  # Outside jit each branch would be compiled.
            seen = chosen()
        else:  # On a CPU the branch would copy the state.
            seen = jax.lax.platform_dependent(cpu=chosen, default=branch)
        count = (state.count + 1) % every
        return steps, WithMetricsState(count, seen[0], seen[1], seen[2], inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
