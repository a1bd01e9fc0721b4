"""Where parameters and optimizer state are placed on a mesh.

Parameters are replicated, or sharded by rules from path pattern to ``PartitionSpec``. State that
is shaped like a parameter has that parameter's sharding. With ZeRO-1 (arXiv 1910.02054) it is
sharded over one more mesh axis, usually the axis of the batch. Other state is replicated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optim_zoo import rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, map_with_path


def state_shardings(
    tx: optax.GradientTransformation, params: Tree, *, mesh: Mesh, zero1: str | None = None
) -> Tree:
    """Returns a `NamedSharding` for every array in the state of ``tx``.

    An array of the state that belongs to a parameter has the sharding of that parameter, and every
    other array is replicated. With ``zero1`` the former are also sharded over that mesh axis, along
    their longest dimension that is not sharded yet and that the size of the axis divides. An array
    without such a dimension keeps the sharding of its parameter: see `unsharded_by_zero1`.

    Args:
      tx: the optimizer.
      params: arrays, or ``jax.ShapeDtypeStruct``s. One without a `NamedSharding` counts as
        replicated.
      mesh: the mesh of devices.
      zero1: the mesh axis to shard the state over, usually the axis of the batch; None (the
        default) shards it as the parameters.

    Returns:
      A tree like the state, with a `NamedSharding` in place of every array: the ``out_shardings``
      of a jitted ``tx.init``, or the layout into which a checkpoint is restored.

    Raises:
      ArgumentValueError: the mesh has no axis of that name.
    """
    check_axis("zero1", zero1, mesh)

    def sharding_like(value: Any, x: Any) -> Any:
        if _is_masked(value):
            return value
        spec = _spec(x)
        return NamedSharding(mesh, spec if zero1 is None else _extended(x.shape, spec, mesh, zero1))

    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(
        tx,
        sharding_like,
        state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=_is_masked,
    )
    return jax.tree.broadcast(shardings, state)


def _is_masked(x: Any) -> bool:
    """Returns whether ``x`` marks a parameter for which a part of the state holds nothing."""
    return isinstance(x, optax.MaskedNode)


def unsharded_by_zero1(params: Tree, *, mesh: Mesh, zero1: str) -> list[str]:
    """Returns the paths of the parameters whose state ``zero1`` does not shard any further.

    The size of that mesh axis divides none of their dimensions that are not sharded yet.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct``s. One without a `NamedSharding` counts as
        replicated.
      mesh: the mesh of devices.
      zero1: see `state_shardings`.

    Raises:
      ArgumentValueError: the mesh has no axis of that name.
    """
    check_axis("zero1", zero1, mesh)

    def path_if_unchanged(path: str, x: Any) -> str:
        return path if _extended(x.shape, _spec(x), mesh, zero1) == _spec(x) else ""

    return [path for path in jax.tree.leaves(map_with_path(path_if_unchanged, params)) if path]


def init(
    tx: optax.GradientTransformation, params: Tree, *, mesh: Mesh, zero1: str | None = None
) -> optax.OptState:
    """Returns the initial state of ``tx``, with the shardings of `state_shardings`.

    ``jax.jit(tx.init)(params)`` alone would place the state on one device, whatever the shardings
    of the parameters.

    Args:
      tx: the optimizer.
      params: arrays. One without a `NamedSharding` counts as replicated.
      mesh: the mesh of devices.
      zero1: the mesh axis to shard the state over, usually the axis of the batch; None (the
        default) shards it as the parameters.

    Raises:
      ArgumentValueError: the mesh has no axis of that name.

    Example:
      ::

        mesh = jax.make_mesh((8,), ("data",))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        state = sharding.init(lamb(1e-3), params, mesh=mesh, zero1="data")
    """
    shardings = state_shardings(tx, params, mesh=mesh, zero1=zero1)
    with jax.set_mesh(automatic(mesh)):
        return jax.jit(tx.init, out_shardings=shardings)(params)


def automatic(mesh: Mesh) -> Mesh:
    """Returns ``mesh`` with Auto axes: the compiler chooses the shardings of intermediate arrays.

    ``jax.make_mesh`` makes Explicit axes, over which many losses do not type-check.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_axis(name: str, axis: Any, mesh: Mesh) -> None:
    """Raises `ArgumentValueError` unless ``axis`` is None or an axis of ``mesh``.

    Args:
      name: the name of the argument that the axis was passed as.
      axis: what was passed.
      mesh: the mesh of devices.
    """
    if axis is not None and axis not in mesh.shape:
        raise ArgumentValueError(name, f"be one of {tuple(mesh.shape)}", axis)


def _spec(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _extended(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, axis: str) -> PartitionSpec:
    """Returns ``spec`` that also shards the longest possible dimension over the mesh axis ``axis``.

    Returns ``spec`` itself where it uses that axis already, or where no dimension is possible.
    """
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    used = [name for part in parts for name in (part if isinstance(part, tuple) else (part,))]
    size = mesh.shape[axis]
    free = [i for i, part in enumerate(parts) if part is None and shape[i] and shape[i] % size == 0]
    if axis in used or not free:
        return spec
    longest = max(free, key=lambda i: shape[i])
    parts[longest] = axis
    # The compiler writes specs without trailing Nones. Another spelling of the same sharding would
    # make the second step compile again.
    while parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def step_shardings(
    tx: optax.GradientTransformation,
    params: Tree,
    *,
    mesh: Mesh,
    zero1: str | None = None,
    param_shardings: rules.Rules = (),
) -> tuple[Tree, Tree]:
    """Returns the shardings of the parameters and of the optimizer state in a training step.

    Args:
      tx: the optimizer.
      params: arrays or ``jax.ShapeDtypeStruct``s. Their own shardings are ignored.
      mesh: the mesh of devices.
      zero1: see `state_shardings`.
      param_shardings: pairs of a path pattern and a ``PartitionSpec``. Parameters that no pattern
        matches are replicated.

    Raises:
      ArgumentTypeError: the value of a rule is not a ``PartitionSpec``.
      ArgumentValueError: a ``PartitionSpec`` does not divide the parameter that it is for.
    """
    specs = rules.assign("param_shardings", param_shardings, params, PartitionSpec())
    of_params = map_with_path(
        lambda path, x, spec: _param_sharding(path, x, spec, mesh), params, specs
    )
    placed = shapes(params, of_params)
    return of_params, state_shardings(tx, placed, mesh=mesh, zero1=zero1)


def shapes(tree: Tree, shardings: Tree) -> Tree:
    """Returns the shapes and dtypes of the arrays of ``tree``, with ``shardings``."""

    def shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    return jax.tree.map(shape, tree, shardings)


def _param_sharding(path: str, x: Any, spec: Any, mesh: Mesh) -> NamedSharding:
    if not isinstance(spec, PartitionSpec):
        raise ArgumentTypeError(
            "param_shardings",
            "give a PartitionSpec for every pattern",
            spec,
            sentence=f"{{argument}}: {path} must have a PartitionSpec, got {spec!r}",
        )
    sharding = NamedSharding(mesh, spec)
    try:
        sharding.shard_shape(jnp.shape(x))
    except ValueError:
        raise ArgumentValueError(
            "param_shardings",
            "give a PartitionSpec that divides the leaf",
            spec,
            sentence=f"{{argument}}: {path} of shape {jnp.shape(x)} cannot be sharded by "
            f"{spec} over the mesh {dict(mesh.shape)}",
        ) from None
    return sharding


def put(tree: Tree, sharding: Any) -> Tree:
    """Returns the arrays of ``tree`` with ``sharding``: one for all of them, or a tree of them.

    This is ``jax.device_put``, except where the shardings span several processes. Every process
    must then pass the same values, of which it copies only the parts of its own devices.
    ``jax.device_put`` would send every array to all processes to compare the values.
    """

    def put_leaf(x: Any, sharding: Any) -> jax.Array:
        if not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put_leaf(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    if all(one.is_fully_addressable for one in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)  # all arrays in one call
    return jax.tree.map(put_leaf, tree, jax.tree.broadcast(sharding, tree))


def copied(tree: Tree, shardings: Tree, *, mesh: Mesh) -> Tree:
    """Returns copies of the arrays of ``tree`` with ``shardings``; they share no memory with it."""
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    with jax.set_mesh(mesh):
        # Placed first, because jit accepts no array that is committed to other devices.
        return copy(put(tree, shardings))


def on_one_device(tree: Tree, *, mesh: Mesh) -> Tree:
    """Returns copies of the arrays of ``tree``, all on the first device of this process."""
    device = SingleDeviceSharding(mesh.local_devices[0])

    def copy(x: jax.Array) -> jax.Array:
        if not x.is_fully_addressable:
            if not x.is_fully_replicated:
                x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
            x = x.addressable_data(0)
        return jax.device_put(x, device, may_alias=False)

    return jax.tree.map(copy, tree)
