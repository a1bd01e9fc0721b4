"""Decisions that all devices take alike, and the two ways a step can go.

Where each device decided for itself whether to make a step, one with a NaN in its part of a
gradient would leave the others waiting in a collective, or hold other parameters from then on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun

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


def step_if(go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree) -> tuple[Tree, Tree]:
    """``step()`` where ``go``, else updates that change nothing and ``state`` as it was; a branch.

    What changes nothing is -0.0, not 0.0: x - 0.0 is x to the last bit, where -0.0 + 0.0 is 0.0.

    Args:
      go: (), bool, the same on all devices.
      step: gives updates and state of the structure, shapes and dtypes of ``state``.

    Raises:
      TypeError: the step changes the shape or dtype of its state, as many of optax's
        transformations do on low-precision parameters.
    """
    # Traced once, or a step inside several wrappers would be traced twice for each of them.
    traced, like = jax.make_jaxpr(step, return_shape=True)()
    updates, after = like
    _check_kept(state, after)

    def made() -> tuple[Tree, Tree]:
        structure: Any = jax.tree.structure(like)
        return structure.unflatten(jaxpr_as_fun(traced)())

    def no_step() -> tuple[Tree, Tree]:
        # One constant would be copied to every leaf of its shape. What XLA cannot know, though it
        # is 1 here, it writes in place.
        leaves, structure = jax.tree.flatten(_nothing(updates))
        ones = [jnp.where(go, number + 2, 1) for number in range(len(leaves))]
        scaled = [x * one.astype(x.dtype) for x, one in zip(leaves, ones, strict=True)]
        return jax.tree.unflatten(structure, scaled), state

    return jax.lax.cond(go, made, no_step)


def choose_step(
    go: jax.Array, step: Callable[[], tuple[Tree, Tree]], state: Tree
) -> tuple[Tree, Tree]:
    """As `step_if`, but the step is computed in any case, and then chosen entry by entry.

    For steps that are nearly always made: what is chosen is written by the kernels that compute it,
    where a branch would cut the clipping before it and the addition after it off from the step. A
    step of TPU's LAMB so moves 12 arrays of each leaf, and in a branch 15. An accumulation in
    ``state`` has branches of its own, and choosing would copy what they leave in place: so there
    it is a branch.
    """
    if all_of(LeftOut, state):
        return step_if(go, step, state)
    updates, after = step()
    _check_kept(state, after)
    return jax.tree.map(
        lambda new, old: jnp.where(go, new, old), (updates, after), (_nothing(updates), state)
    )


def _nothing(updates: Tree) -> Tree:
    """Updates like these that change nothing."""

    def nothing(like: Any) -> jax.Array:
        if jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.full_like(like, -0.0)
        return jnp.zeros_like(like)  # the ids of SparseRows, whose zero is padding

    return jax.tree.map(nothing, updates)


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
