"""Decisions that all devices take alike, and the two ways a step can go.

Where each device decided for itself whether to make a step, one with a NaN in its part of a
gradient would leave the others waiting in a collective, or hold other parameters from then on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rows
from optim_zoo.errors import ArgumentTypeError
from optim_zoo.layers.mesh_axes import AxisName, all_axis_names, assign_axis_names
from optim_zoo.ranges import several_numbers
from optim_zoo.tree import Tree, leaf_paths, varying_axes, wide


class Refusals(NamedTuple):
    """What a guard has refused so far."""

    total: jax.Array  # (), int32: steps refused, saturating
    in_a_row: jax.Array  # (), int32: up to now; 0 after a step that was made
    most: jax.Array  # (), int32: in a row, until `check` raises; as the guard was last told

    @classmethod
    def none(cls, most: int) -> Self:
        """Before the first step."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.asarray(most, jnp.int32))

    def counted(self, go: jax.Array, most: int) -> Self:
        """After a step that was made where ``go``, and refused elsewhere."""
        return type(self)(
            jnp.where(go, self.total, optax.safe_increment(self.total)),
            jnp.where(go, 0, optax.safe_increment(self.in_a_row)),
            jnp.full_like(self.most, most),
        )


class LeftOut(NamedTuple):
    """What an accumulation has left out of its means so far."""

    micro_batches: jax.Array  # (), int32, saturating


_Kind = TypeVar("_Kind", Refusals, LeftOut)


def all_of(kind: type[_Kind], state: Tree) -> list[_Kind]:
    """Returns every ``kind`` in ``state``, one per guard or accumulation.

    Their fields are arrays, also where an ``nnx.Optimizer`` keeps each of them in a variable.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [kind(*jax.tree.leaves(node)) for node in nodes if isinstance(node, kind)]


def all_finite(tree: Tree, axis_name: AxisName = None) -> jax.Array:
    """Whether every number in ``tree`` is finite on every device: (), bool.

    Args:
      tree: arrays and `SparseRows`.
      axis_name: the mesh axes over which leaves are cut, beside those that types tell; see
        `scale_by_trust_ratio`.
    """
    arrays = jax.tree.map(
        lambda x: x.rows if rows.is_sparse(x) else x, tree, is_leaf=rows.is_sparse
    )
    told = assign_axis_names(axis_name, arrays)
    structure: Any = jax.tree.structure(arrays)
    broken: dict[tuple[str, ...], Any] = {}  # leaves, by the mesh axes over which they are cut
    for x, names in zip(jax.tree.leaves(arrays), structure.flatten_up_to(told), strict=True):
        axes = tuple(sorted(varying_axes(x) | set(names)))
        broken[axes] = broken.get(axes, 0) + jnp.any(~jnp.isfinite(x)).astype(jnp.int32)
    counts = [jax.lax.psum(count, axes) if axes else count for axes, count in broken.items()]
    return sum(counts, jnp.zeros((), jnp.int32)) == 0


def mean_loss(value: jax.typing.ArrayLike, axis_name: AxisName) -> jax.Array:
    """A loss given as ``value=``, averaged over the devices where each may have its own: float32.

    Raises:
      ArgumentValueError: it is not one number.
    """
    value = wide(value).astype(jnp.float32)
    if value.ndim:
        raise several_numbers("value", value)
    axes = tuple(sorted(varying_axes(value) | all_axis_names(axis_name)))
    return jax.lax.pmean(value, axes) if axes else value


def materialized(go: jax.Array) -> jax.Array:
    """Returns ``go``, which a program for a CPU then computes once instead of at every use.

    XLA on a CPU repeats a cheap computation in every kernel that reads its result. A decision that
    depends on all leaves, and that the kernels of every leaf read, would make the program grow with
    the square of the number of leaves, and so would the time to compile it. XLA never repeats a
    branch, so here the decision is the result of one.

    Args:
      go: (), bool. Under ``vmap`` it is an array and has no such branch.
    """
    if not isinstance(go, jax.core.Tracer):
        return go
    return jax.lax.platform_dependent(go, cpu=_by_a_branch, default=lambda go: go)


def _by_a_branch(go: jax.Array) -> jax.Array:
    return jax.lax.cond(go, jnp.ones_like, jnp.zeros_like, go)


def step_if(
    go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree, gradients: Tree
) -> tuple[Tree, Tree]:
    """``step()`` where ``go``, else updates that change nothing and ``state`` unchanged; a branch.

    What changes nothing is -0.0, not 0.0: x - 0.0 is x to the last bit, where -0.0 + 0.0 is 0.0.

    Args:
      go: (), bool, the same on all devices.
      step: gives updates and state of the structure, shapes and dtypes of ``state``.
      gradients: what ``step`` makes updates of.

    Raises:
      TypeError: the step changes the shape or dtype of its state, as many of optax's
        transformations do on low-precision parameters.
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
    """As `step_if`, but on accelerators the step is always computed, and chosen entry by entry.

    For steps that are nearly always made. On an accelerator, the kernels that compute the step also
    choose. A branch would separate the step from the clipping before it and from the addition after
    it: a step of LAMB on a TPU moves 12 arrays of each leaf, and in a branch 15. On a CPU a branch
    takes half the time and fewer temporaries, because no old state is kept to choose from.

    There are two exceptions on every device. Where ``state`` holds an accumulation, which has a
    branch of its own, the step is a branch, because choosing would copy what that one leaves in
    place. In a mapped function the step is chosen, because devices that decide differently, where
    an ``axis_name`` was forgotten, would wait for one another in the collectives of a branch.
    """
    if all_of(LeftOut, state):
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


def traced_once(function: Callable[[], Tree]) -> Callable[[], Tree]:
    """Returns ``function``, which is then traced once however many branches call it.

    Otherwise each wrapper around another would double the number of times that what is inside is
    traced. For functions that are called while another one is traced: each call of `traced_once`
    compiles anew outside.
    """
    return jax.jit(function)


def _nothing(updates: Tree) -> Tree:
    """Updates like these that change nothing."""

    def nothing(like: Any) -> jax.Array:
        if _is_floating(like):
            return jnp.full_like(like, -0.0)
        return jnp.zeros_like(like)  # the ids of SparseRows, whose zero is padding

    return jax.tree.map(nothing, updates)


def _written_in_place(go: jax.Array, nothing: Tree, gradients: Tree) -> Tree:
    """``nothing``, in a branch that is taken where ``go`` is False. XLA does not know that.

    XLA would compute equal leaves once and copy the result to each of them. Leaves that seem to
    depend on ``go`` in different ways are each written in place. On accelerators the difference is
    a number. On a CPU, where such numbers would give every leaf a kernel that takes 15 ms to
    compile, it is the gradient: kernels that differ in their inputs only are compiled once for each
    shape. The gradient is not read, because ``go`` is False.
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
    """Whether two arrays have the same shape, and are sharded alike as far as types say so."""
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
