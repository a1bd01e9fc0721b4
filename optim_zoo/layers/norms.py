"""Euclidean norms of layers and of whole trees, in one pass over each array."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optim_zoo import rows
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers.mesh_axes import AxisName, assign_axis_names
from optim_zoo.layers.specs import Layers
from optim_zoo.tree import Tree, varying_axes, wide


def squared_norm(x: jax.Array, layers: Layers = (), axis_names: Sequence[str] = ()) -> jax.Array:
    """sum(x^2) of each layer, in float32 or wider, in one pass over ``x``.

    Args:
      x: any shape.
      layers: what a layer is in ``x``.
      axis_names: mesh axes ``x`` is sharded over, besides those that its type records.

    Returns:
      Shape ``()`` for one layer, else ``(layers,)`` in row-major order of the array's axes.

    Raises:
      ValueError: in a mapped context, layers are spread over a mesh axis that there is not.
    """
    kept = [layer.axis for layer in layers]
    square = jnp.square(wide(_with_own_conversion(x)))
    total = jnp.sum(square, axis=[i for i in range(x.ndim) if i not in kept])
    if layers:
        # Blocks are summed last, on the small remainder: a reshape of x itself would make XLA
        # gather an array that is sharded along the axis.
        total = _gathered(total)
        blocks = []
        for size, layer in zip(total.shape, layers, strict=True):
            count = layer.count(x.shape)
            blocks += [count, size // max(count, 1)]
        total = total.reshape(blocks).sum(axis=range(1, len(blocks), 2)).reshape(-1)
    apart = {layer.mesh_axis for layer in layers if layer.mesh_axis}
    cut = varying_axes(x) | set(axis_names)
    known = jax.sharding.get_abstract_mesh().axis_names
    unknown = sorted(apart.difference(known))
    if cut and known and unknown:  # a misspelt name would be ignored, and these layers share a norm
        raise ArgumentValueError(
            "mesh_axis",
            f"be one of {known}",
            unknown,
            sentence=f"stacked: {{argument}} must be one of {known}, got {', '.join(unknown)}",
        )
    axes = tuple(sorted(cut - apart))
    return jax.lax.psum(total, axes) if axes else total


def _with_own_conversion(x: jax.Array) -> jax.Array:
    """Returns ``x``. On a CPU its conversion to float32 is not shared with other uses of it.

    An update reads a bfloat16 array twice, for its norm and then entry by entry. Where both share
    the conversion, XLA on a CPU writes the float32 array to memory, in LARS for the parameters and
    for the gradients at once. XLA removes the barrier, but only after it has looked for equal
    operations. Other devices fuse a shared conversion into each of its uses; there a barrier
    would prevent that.

    A barrier does not help float16, whose conversion XLA on a CPU never fuses into a sum.
    """
    if x.dtype != jnp.bfloat16 or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=_unchanged)


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def _gathered(x: jax.Array) -> jax.Array:
    """``x`` whole on every device where its type says it is cut over an Explicit mesh axis.

    Else a reshape would be refused, and state would change its type after the first step.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def norm(x: jax.Array, layers: Layers = (), axis_names: Sequence[str] = ()) -> jax.Array:
    """The Euclidean norm of each layer: the square root of `squared_norm`."""
    return jnp.sqrt(squared_norm(x, layers, axis_names))


def global_norm(tree: Tree, axis_name: AxisName = None) -> jax.Array:
    """The Euclidean norm of all leaves together: (), float32 or wider.

    Args:
      tree: arrays and `SparseRows`; rows of the same id count as one, their sum.
      axis_name: the mesh axes leaves are sharded over, besides those that their types record.
    """
    arrays = rows.summed(tree)
    axis_names = assign_axis_names(axis_name, arrays)
    squares = jax.tree.map(lambda x, names: squared_norm(x, (), names), arrays, axis_names)
    return jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros((), jnp.float32)))


def norm_shape(shape: Sequence[int], layers: Layers) -> tuple[int, ...]:
    """The shape of the norms of an array of ``shape``: ``()``, or ``(layers,)``."""
    return (math.prod(layer.count(shape) for layer in layers),) if layers else ()


def fill(value: float, x: jax.typing.ArrayLike, layers: Layers) -> jax.Array:
    """``value`` for each layer of ``x``, float32, of the type that the norms of ``x`` will have."""
    values = jnp.full(norm_shape(jnp.shape(x), layers), value, jnp.float32)
    apart = varying_axes(x) & {layer.mesh_axis for layer in layers}
    return jax.lax.pcast(values, tuple(sorted(apart)), to="varying") if apart else values


def expand(values: jax.Array, shape: Sequence[int], layers: Layers) -> jax.Array:
    """One value a layer, shaped so that it multiplies an array of ``shape``."""
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
