"""Decisions that all devices make together, and the two ways a step can go.

If each device decided for itself whether to make a step, a device with a NaN in its part of a
gradient would leave the others waiting in a collective, or its parameters would differ from theirs
from then on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optim_zoo import rows
from optim_zoo.errors import ArgumentTypeError
from optim_zoo.layers.mesh_axes import AxisName, all_axis_names, assign_axis_names
from optim_zoo.ranges import several_numbers
from optim_zoo.tree import Tree, leaf_paths, varying_axes, wide
from optim_zoo.wrappers.counters import SkippedMicroBatches, all_of


def all_finite(tree: Tree, axis_name: AxisName = None) -> jax.Array:
    """Returns whether every number in ``tree`` is finite on every device: (), bool.

    Args:
      tree: arrays and `SparseRows`.
      axis_name: the mesh axes over which leaves are sharded, in addition to those that their types
        show; see `scale_by_trust_ratio`.
    """
    arrays = jax.tree.map(
        lambda x: x.rows if rows.is_sparse(x) else x, tree, is_leaf=rows.is_sparse
    )
    passed = assign_axis_names(axis_name, arrays)
    structure: Any = jax.tree.structure(arrays)
    # The number of leaves that are not finite, by the mesh axes over which they are sharded.
    broken: dict[tuple[str, ...], Any] = {}
    for x, names in zip(jax.tree.leaves(arrays), structure.flatten_up_to(passed), strict=True):
        axes = tuple(sorted(varying_axes(x) | set(names)))
        broken[axes] = broken.get(axes, 0) + jnp.any(~jnp.isfinite(x)).astype(jnp.int32)
    counts = [jax.lax.psum(count, axes) if axes else count for axes, count in broken.items()]
    return sum(counts, jnp.zeros((), jnp.int32)) == 0


def mean_loss(value: jax.typing.ArrayLike, axis_name: AxisName) -> jax.Array:
    """Returns the mean over devices of a loss that was passed as ``value=``: (), float32.

    Args:
      value: one number, which may differ between devices.
      axis_name: see `all_finite`.

    Raises:
      ArgumentValueError: ``value`` is not one number.
    """
    value = wide(value).astype(jnp.float32)
    if value.ndim:
        raise several_numbers("value", value)
    axes = tuple(sorted(varying_axes(value) | all_axis_names(axis_name)))
    return jax.lax.pmean(value, axes) if axes else value


def materialized(go: jax.Array) -> jax.Array:
    """Returns ``go``, computed once on a CPU instead of at every use.

    XLA on CPU repeats a cheap computation in every kernel that reads its result. A decision that
    depends on all leaves and is read by the kernels of every leaf would make the program, and the
    time to compile it, grow with the square of the number of leaves. XLA never repeats a branch, so
    that the decision is made the result of one.

    Args:
      go: (), bool. Under ``vmap`` it is an array, and there is no branch.
    """
    if not isinstance(go, jax.core.Tracer):
        return go
    return jax.lax.platform_dependent(go, cpu=_by_a_branch, default=lambda go: go)


def _by_a_branch(go: jax.Array) -> jax.Array:
    return jax.lax.cond(go, jnp.ones_like, jnp.zeros_like, go)


def step_if(
    go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree, gradients: Tree
) -> tuple[Tree, Tree]:
    """Returns ``step()`` where ``go`` is True, else a no-op and ``state`` unchanged, by a branch.

    The updates of a no-op are -0.0: adding 0.0 would turn a parameter of -0.0 into 0.0.

    Args:
      go: (), bool, the same on all devices.
      step: returns updates, and a state with the structure, shapes and dtypes of ``state``.
      state: the state before the step.
      gradients: the gradients from which ``step`` computes updates.

    Raises:
      ArgumentTypeError: the step changes the structure, a shape or a dtype of its state, as many of
        optax's transformations do with low-precision parameters.
    """
    step = traced_once(step)
    updates, after = jax.eval_shape(step)
    _check_kept(state, after)

    def no_step() -> tuple[Tree, Tree]:
        return _written_in_place(go, _nothing(updates), gradients), state

    return jax.lax.cond(go, step, no_step)


def choose_step(
    go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree, gradients: Tree
) -> tuple[Tree, Tree]:
    """Does what `step_if` does, but on accelerators always computes the step and then selects.

    This is meant for steps that are nearly always made. On an accelerator, the kernels that compute
    the step also select. A branch would separate the step from the clipping before it and from the
    addition after it: a step of LAMB on a TPU reads and writes 12 arrays for each leaf, and 15 in a
    branch. On a CPU, a branch takes half the time and fewer temporaries, because no old state is
    kept to select from.

    There are two exceptions on every device. Where ``state`` holds an accumulation, which has a
    branch of its own, the step is a branch, because selecting would copy the arrays that the inner
    branch leaves in place. In a mapped function the step is selected, because devices that decide
    differently, where an ``axis_name`` was forgotten, would wait for one another in the collectives
    of a branch.

    Args:
      go, step, state, gradients: see `step_if`.

    Raises:
      ArgumentTypeError: see `step_if`.
    """
    if all_of(SkippedMicroBatches, state):
        return step_if(go, step, state, gradients)
    mapped = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if mapped or not isinstance(go, jax.core.Tracer):  # outside jit each branch would be compiled
        return _choose(materialized(go), step, state)
    step = traced_once(step)
    return jax.lax.platform_dependent(
        cpu=lambda: step_if(go, step, state, gradients),
        default=lambda: _choose(go, step, state),
    )


def _choose(go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree) -> tuple[Tree, Tree]:
    updates, after = step()
    _check_kept(state, after)
    return jax.tree.map(
        lambda new, old: jnp.where(go, new, old), (updates, after), (_nothing(updates), state)
    )


def cast_like(after: Tree, before: Tree) -> Tree:
    """Returns ``after`` with its floating-point leaves in the dtypes of ``before``.

    Where their structures differ, ``after`` is unchanged, and `step_if` raises.
    """
    structure: Any = jax.tree.structure(before)
    if structure != jax.tree.structure(after):
        return after

    def cast(x: jax.Array, like: jax.Array) -> jax.Array:
        return x.astype(like.dtype) if _is_floating(x) and _is_floating(like) else x

    return jax.tree.map(cast, after, before)


def traced_once(function: Callable[[], Tree]) -> Callable[[], Tree]:
    """Returns a function that is traced once, however many branches call it.

    Otherwise every wrapper would double the number of times that the transformation inside it is
    traced. Use it only while another function is traced: outside, each call of `traced_once` would
    compile the function again.
    """
    return jax.jit(function)


def _nothing(updates: Tree) -> Tree:
    """Returns the updates of a no-op, in the shapes and dtypes of ``updates``."""

    def nothing(like: Any) -> jax.Array:
        if _is_floating(like):
            return jnp.full_like(like, -0.0)
        return jnp.zeros_like(like)  # the ids of SparseRows, whose zero is padding

    return jax.tree.map(nothing, updates)


def _written_in_place(go: jax.Array, nothing: Tree, gradients: Tree) -> Tree:
    """Returns ``nothing``, for a branch that is taken where ``go`` is False.

    XLA would compute equal leaves once and copy the result to each of them. Leaves that seem to
    depend on ``go`` in different ways are each written in place, because XLA does not know that
    ``go`` is False here. On accelerators the leaves differ in a number. On a CPU, where each number
    would need a kernel that takes 15 ms to compile, they differ in their gradients: kernels that
    differ only in their inputs are compiled once for each shape. The gradients are never read.
    """
    leaves = jax.tree.leaves(nothing)
    structure: Any = jax.tree.structure(nothing)

    def by_number() -> list[jax.Array]:
        return [
            x * jnp.where(go, number + 2, 1).astype(x.dtype) if _is_floating(x) else x
            for number, x in enumerate(leaves)
        ]

    def by_gradient() -> list[jax.Array]:
        return [
            jnp.where(go, g.astype(x.dtype), x) if _is_floating(x) else x
            for g, x in zip(jax.tree.leaves(gradients), leaves, strict=True)
        ]

    alike = jax.tree.structure(gradients) == structure and all(
        map(_placed_alike, jax.tree.leaves(gradients), leaves)
    )
    written = (
        jax.lax.platform_dependent(cpu=by_gradient, default=by_number) if alike else by_number()
    )
    return jax.tree.unflatten(structure, written)


def _placed_alike(x: jax.Array, y: jax.Array) -> bool:
    """Returns whether two arrays have the same shape, and the same sharding by their types."""
    return all(
        getattr(jax.typeof(x), name) == getattr(jax.typeof(y), name)
        for name in ("shape", "sharding", "manual_axis_type")
    )


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _check_kept(before: Tree, after: Tree) -> None:
    structure: Any = jax.tree.structure(before)
    if structure != jax.tree.structure(after):
        expected = "keep the structure of its state in a step"
        raise ArgumentTypeError(
            "inner",
            expected,
            str(jax.tree.structure(after)),
            sentence=f"the inner transformation must {expected}",
        )
    changed = [
        f"{path or 'state'} from {_kind(x)} to {_kind(y)}"
        for path, x, y in zip(
            leaf_paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
        )
        if _kind(x) != _kind(y)
    ]
    if changed:
        expected = "keep the shapes and dtypes of its state in a step"
        advice = "put precision.master_weights around it, or take one whose state is float32"
        raise ArgumentTypeError(
            "inner",
            expected,
            changed,
            advice,
            sentence=f"the inner transformation must {expected}, but it changes "
            f"{', '.join(changed[:3])}: {advice}",
        )


def _kind(x: Any) -> str:
    return f"{jnp.result_type(x)}{jnp.shape(x)}"
