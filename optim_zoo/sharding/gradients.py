"""The gradient of the mean loss over a batch that is divided over devices and micro-batches.

A `WeightedLoss` is the sum ``s`` of the losses of some examples and the sum ``w`` of their weights.
(A loss that returns only the mean over its examples counts as ``s`` with ``w = 1``.) On device
``d`` with micro-batch ``m``,

    weight   = sum_dm w_dm
    loss     = sum_dm s_dm / weight
    gradient = sum_dm ds_dm/dparams / weight

and loss and gradient are 0 where the weight is 0. The sums over micro-batches and devices are in
float32, or in the dtype of the parameters where that is wider. The sum over devices is taken once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from optim_zoo.sharding import auxiliary
from optim_zoo.sharding.auxiliary import Aux, Plan
from optim_zoo.sharding.losses import LossFn, loss_and_aux
from optim_zoo.tree import Tree, varying_axes, wide
from optim_zoo.wrappers.noise_scale import Spread

# of gradients, losses, weights, aux, and the `Spread`, which is () where it is not wanted
_Sums = tuple[Tree, jax.Array, jax.Array, list[Any], Any]


def mean_gradient(
    loss_fn: LossFn,
    params: Tree,
    batch: Tree,
    *,
    micro_batches: int = 1,
    axis_name: str | None = None,
    has_aux: bool = False,
    spread: bool = False,
) -> tuple[jax.Array, jax.Array, Tree, Aux, Any]:
    """Returns ``(loss, weight, gradient, aux, spread)`` of the mean over the global batch.

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns the mean loss or a `WeightedLoss`.
      params: the parameters.
      batch: the global batch or, with ``axis_name``, the rows of this device.
      micro_batches: the number of parts that the batch is divided into. They are processed one
        after another, and must divide the first axis of every array of ``batch``. Micro-batch
        ``m`` has the rows ``m, m + micro_batches, ...``.
      axis_name: inside ``shard_map`` or ``pmap``, the mesh axis that the batch is sharded over.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      spread: whether the `Spread` of the gradients over devices and micro-batches is wanted.

    Returns:
      The mean loss and the sum of the weights, both scalars in JAX's default float dtype; the
      gradient, in float32 or wider; aux, which is without leaves unless ``has_aux``; and the
      `Spread`, or ``()``. See `optim_zoo.sharding.auxiliary` for how aux is combined over devices
      and micro-batches.
    """
    # Under shard_map, JAX itself sums the gradient of a value that does not vary over devices, in
    # the dtype of the parameters. So the parameters are cast to a type that varies.
    params = _varying(params, axis_name)
    plan = auxiliary.NO_AUX
    if has_aux:
        plan = auxiliary.plan(loss_fn, params, _first(batch, micro_batches))
    sums, rows = _summed(loss_fn, params, batch, micro_batches, axis_name, plan, spread)
    gradient, total, weight, added, spreads = sums
    gradient = jax.tree.map(wide, gradient)
    if axis_name is not None:
        gradient, total, weight, added, spreads = jax.tree.map(
            lambda x: jax.lax.psum(x, axis_name), (gradient, total, weight, added, spreads)
        )
    # A batch without any weight, such as one without masked tokens, has a zero gradient, not 0 / 0.
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    mean = jax.tree.map(lambda g: g * scale, gradient)
    return total * scale, weight, mean, plan.combined(added, rows), spreads


def _varying(tree: Tree, axis_name: str | None) -> Tree:
    """Casts arrays to the type of a value that differs between devices.

    This is a no-op where JAX does not track it: under ``pmap``, and with ``check_vma=False``.
    """

    def cast(x: jax.Array) -> jax.Array:
        if axis_name is None or axis_name in varying_axes(x):
            return x
        return jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def _summed(
    loss_fn: LossFn,
    params: Tree,
    batch: Tree,
    micro_batches: int,
    axis_name: str | None,
    plan: Plan,
    spread: bool,
) -> tuple[_Sums, list[Any]]:
    """Returns the sums over micro-batches on this device, and the rows of aux."""
    if micro_batches == 1:
        return _sums(loss_fn, params, batch, plan, spread)

    def add(carry: _Sums, micro_batch: Tree) -> tuple[_Sums, list[Any]]:
        sums, rows = _sums(loss_fn, params, micro_batch, plan, spread)
        return jax.tree.map(jnp.add, carry, sums), rows

    zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)
    spreads = Spread.zero() if spread else ()
    start = (zeros, jnp.zeros((), float), jnp.zeros((), float), plan.zeros(), spreads)
    sums, rows = jax.lax.scan(add, _varying(start, axis_name), _divided(batch, micro_batches))
    return sums, _joined(rows)


def _divided(batch: Tree, micro_batches: int) -> Tree:
    """Returns micro-batches along a new first axis.

    Micro-batch ``m`` has the rows ``m, m + micro_batches, ...``, so that no row of a sharded batch
    changes its device.
    """
    return jax.tree.map(
        lambda x: jnp.reshape(x, (-1, micro_batches, *x.shape[1:])).swapaxes(0, 1), batch
    )


def _joined(micro_batches: Tree) -> Tree:
    """Returns the rows in the order of the batch: the inverse of `_divided`."""
    return jax.tree.map(lambda x: jnp.reshape(x.swapaxes(0, 1), (-1, *x.shape[2:])), micro_batches)


def _first(batch: Tree, micro_batches: int) -> Tree:
    """Returns a batch of the size of a micro-batch."""
    return jax.tree.map(lambda x: x[: x.shape[0] // micro_batches], batch)


def _sums(
    loss_fn: LossFn, params: Tree, batch: Tree, plan: Plan, spread: bool
) -> tuple[_Sums, list[Any]]:
    """Returns what one call of the loss adds to the sums, and its rows of aux."""
    has_aux = plan is not auxiliary.NO_AUX

    def objective(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        (total, weight), aux = loss_and_aux(loss_fn(params, batch), has_aux)
        return total, (weight, aux)

    (total, (weight, aux)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    added, rows = plan.parts(aux, weight)
    # The gradient is that of the total, w times the mean gradient.
    spreads = Spread.of(weight, _square(gradient) / weight**2) if spread else ()
    return (gradient, total, weight, added, spreads), rows


def _square(gradient: Tree) -> jax.Array:
    """Returns the squared norm of the gradient on this device, which is not summed over devices."""
    squares = [jnp.sum(jnp.square(wide(g))) for g in jax.tree.leaves(gradient)]
    return sum(squares, jnp.zeros((), jnp.float32))


def mean_gradient_by_device(
    loss_fn: LossFn,
    params: Tree,
    batch: Tree,
    *,
    mesh: Mesh,
    axis_name: str,
    micro_batches: int = 1,
    has_aux: bool = False,
    spread: bool = False,
) -> tuple[jax.Array, jax.Array, Tree, Aux, Any]:
    """Returns the `mean_gradient` of global arrays, computed on each device's own rows.

    Under jit, the compiler would sum the gradients over devices in every micro-batch, and in the
    dtype of the model's arithmetic. Here they are summed once, in float32. Mesh axes other than
    ``axis_name`` are left to the compiler.
    """

    def on_device(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array, Tree, Aux, Any]:
        return mean_gradient(
            loss_fn,
            params,
            batch,
            micro_batches=micro_batches,
            axis_name=axis_name,
            has_aux=has_aux,
            spread=spread,
        )

    replicated = PartitionSpec()
    of_aux = Aux(replicated, PartitionSpec(axis_name))
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(replicated, PartitionSpec(axis_name)),
        out_specs=(replicated, replicated, replicated, of_aux, replicated),
        axis_names={axis_name},
    )(params, batch)
