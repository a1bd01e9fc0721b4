"""The layout of mode ``pmap``: arrays have a leading axis with one index per device.

A replicated array ``x`` becomes copies of shape ``(devices, *x.shape)``. A batch of ``n`` rows
becomes an array of shape ``(devices, n / devices, ...)``. In every function ``by_device`` is the
sharding of such arrays, whose first axis is sharded over all devices of the mesh.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optim_zoo.sharding.auxiliary import Aux
from optim_zoo.sharding.placement import put
from optim_zoo.tree import Tree


def new_copies(tree: Tree, by_device: NamedSharding) -> Tree:
    """Returns the arrays with a device axis, as copies that share no memory with ``tree``."""
    devices = by_device.mesh.size
    copies = jax.tree.map(lambda x: jnp.stack([x] * devices), jax.device_get(tree))
    return jax.device_put(copies, by_device)


def added(tree: Tree, by_device: NamedSharding) -> Tree:
    """Returns the arrays with a device axis. They may share memory with ``tree``."""
    replicated = NamedSharding(by_device.mesh, PartitionSpec())

    def add(x: jax.Array) -> jax.Array:
        copies = [shard.data[None] for shard in put(x, replicated).addressable_shards]
        shape = (by_device.mesh.size, *jnp.shape(x))
        return jax.make_array_from_single_device_arrays(shape, by_device, copies)

    return jax.tree.map(add, tree)


def removed(tree: Tree, by_device: NamedSharding) -> Tree:
    """Returns replicated arrays without the device axis: the inverse of `added`."""
    replicated = NamedSharding(by_device.mesh, PartitionSpec())

    def remove(x: jax.Array) -> jax.Array:
        copies = [shard.data.squeeze(0) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape[1:], replicated, copies)

    return jax.tree.map(remove, tree)


def batch_divided(batch: Tree, by_device: NamedSharding) -> Tree:
    """Returns the batch with its rows divided over the devices."""

    def divide(x: jax.Array) -> jax.Array:
        rows = jnp.reshape(x, (by_device.mesh.size, -1, *jnp.shape(x)[1:]))
        return jax.device_put(rows, by_device)

    return jax.tree.map(divide, batch)


def removed_from_aux(aux: Aux) -> Aux:
    """Returns aux without the device axis: the rows of all devices are concatenated."""
    return Aux(
        replicated=jax.tree.map(lambda x: x[0], aux.replicated),
        rows=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux.rows),
    )


def copied_shapes(tree: Tree, by_device: NamedSharding) -> Tree:
    """Returns the shapes and dtypes of arrays like those of ``tree`` with a device axis."""
    devices = by_device.mesh.size
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), tree)


def divided_shapes(batch: Tree, by_device: NamedSharding) -> Tree:
    """Returns the shapes and dtypes of `batch_divided`."""
    devices = by_device.mesh.size

    def divide(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, x.shape[0] // devices, *x.shape[1:]), x.dtype)

    return jax.tree.map(divide, batch)
