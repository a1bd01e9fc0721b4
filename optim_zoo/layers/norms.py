"""Euclidean norms of layers and of whole trees, in one pass over each array."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optim_zoo import rows
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import wide_range
from optim_zoo.layers.mesh_axes import AxisName, assign_axis_names
from optim_zoo.layers.specs import Layers
from optim_zoo.tree import Tree, varying_axes, wide


def norm(x: jax.Array, layers: Layers = (), axis_names: Sequence[str] = ()) -> jax.Array:
    """Returns the Euclidean norm of each layer of ``x``; see `norms_of`."""
    return norms_of([x], layers, axis_names)[0]


def norms_of(
    arrays: Sequence[jax.Array], layers: Layers = (), axis_names: Sequence[str] = ()
) -> list[jax.Array]:
    """Returns the Euclidean norm of each layer of several arrays, in float32 or wider.

    ::

        sqrt(sum of x^2)   of each layer, in one pass over the array

    In float32 and bfloat16 the norm is right for entries from 1e-28 to 1e25; see `wide_range`.

    Args:
      arrays: of one shape, such as a parameter and its update. Together they take one branch.
      layers: the layers of each array.
      axis_names: mesh axes that the arrays are sharded over, besides those that their types record.

    Returns:
      For each array a norm of shape ``()`` for one layer, else ``(layers,)``, in row-major order of
      the axes of the array.

    Raises:
      ArgumentValueError: in a mapped context, stacked layers name a mesh axis that does not exist.
    """
    arrays = [jnp.asarray(x) for x in arrays]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return _traced(arrays, layers, tuple(axis_names))
    return _norms_of(arrays, layers, axis_names)


def _norms_of(
    arrays: Sequence[jax.Array], layers: Layers, axis_names: Sequence[str]
) -> list[jax.Array]:
    def sums(arrays: Sequence[jax.Array], factors: Sequence[jax.Array] | None) -> list[jax.Array]:
        return [
            _sum_of_squares(x, factors[i] if factors else None, layers, axis_names)
            for i, x in enumerate(arrays)
        ]

    return wide_range.roots(sums, arrays)


# Leaves of the same shape are traced once.
_traced = jax.jit(_norms_of, static_argnums=(1, 2))


def _sum_of_squares(
    x: jax.Array, factor: jax.Array | None, layers: Layers, axis_names: Sequence[str]
) -> jax.Array:
    """Returns the sum of (factor x)^2 of each layer; see `norms_of`.

    The factor is None, a scalar, or one for each layer.
    """
    kept = [layer.axis for layer in layers]
    scaled = wide(x)
    if factor is not None:
        factor = factor.astype(scaled.dtype)
        scaled *= expand(factor, x.shape, layers) if factor.ndim else factor
    total = jnp.sum(jnp.square(scaled), axis=[i for i in range(x.ndim) if i not in kept])
    if layers:
        # Blocks are summed last, on the small remainder: a reshape of x itself would make XLA
        # gather an array that is sharded along the axis.
        total = _gathered(total)
        blocks = []
        for size, layer in zip(total.shape, layers, strict=True):
            count = layer.count(x.shape)
            blocks += [count, size // max(count, 1)]
        total = total.reshape(blocks).sum(axis=range(1, len(blocks), 2)).reshape(-1)
    separate = {layer.mesh_axis for layer in layers if layer.mesh_axis}
    sharded = varying_axes(x) | set(axis_names)
    known = jax.sharding.get_abstract_mesh().axis_names
    unknown = sorted(separate.difference(known))
    if sharded and known and unknown:  # a misspelt name would be ignored, and they share a norm
        raise ArgumentValueError(
            "mesh_axis",
            f"be one of {known}",
            unknown,
            sentence=f"stacked: {{argument}} must be one of {known}, got {', '.join(unknown)}",
        )
    axes = tuple(sorted(sharded - separate))
    return jax.lax.psum(total, axes) if axes else total


def _gathered(x: jax.Array) -> jax.Array:
    """Replicates ``x`` if its type says that it is sharded over a mesh axis of type Explicit.

    Otherwise a reshape would raise, and the type of the state would change after the first step.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def global_norm(tree: Tree, axis_name: AxisName = None, *, whole_range: bool = True) -> jax.Array:
    """Returns the Euclidean norm of all leaves together: (), float32 or wider.

    In float32 and bfloat16 it is correct for entries from 1e-28 to 1e25; see `wide_range`.

    Args:
      tree: arrays and `SparseRows`; rows of the same id count as one, their sum.
      axis_name: the mesh axes that leaves are sharded over, in addition to those in their types.
      whole_range: whether entries below 1e-18 and above 1e18 count too.

    Raises:
      ArgumentValueError: the type of a leaf says that it is not sharded over one of these axes.
    """
    summed = rows.summed(tree)
    structure: Any = jax.tree.structure(summed)
    names = structure.flatten_up_to(assign_axis_names(axis_name, summed))

    def sums(arrays: Sequence[jax.Array], factors: Sequence[jax.Array] | None) -> list[jax.Array]:
        squares = [
            _sum_of_squares(x, factors[i] if factors else None, (), names[i])
            for i, x in enumerate(arrays)
        ]
        return [sum(squares, jnp.zeros((), jnp.float32))]

    roots = wide_range.roots if whole_range else wide_range.plain_roots
    return roots(sums, jax.tree.leaves(summed))[0]


def norm_shape(shape: Sequence[int], layers: Layers) -> tuple[int, ...]:
    """Returns the shape of the norms of an array of ``shape``: ``()``, or ``(layers,)``."""
    return (math.prod(layer.count(shape) for layer in layers),) if layers else ()


def fill(value: float, x: jax.typing.ArrayLike, layers: Layers) -> jax.Array:
    """Returns a float32 ``value`` for each layer of ``x``, with the type of the norms of ``x``."""
    values = jnp.full(norm_shape(jnp.shape(x), layers), value, jnp.float32)
    apart = varying_axes(x) & {layer.mesh_axis for layer in layers}
    return jax.lax.pcast(values, tuple(sorted(apart)), to="varying") if apart else values


def expand(values: jax.Array, shape: Sequence[int], layers: Layers) -> jax.Array:
    """Returns one value for each layer, in a shape that multiplies an array of ``shape``."""
    if not layers:
        return values
    counts = [1] * len(shape)
    for layer in layers:
        counts[layer.axis] = layer.count(shape)
    values = values.reshape(counts)
    for layer in layers:
        if layer.parts is not None:
            values = jnp.repeat(values, shape[layer.axis] // layer.parts, axis=layer.axis)
    return values
