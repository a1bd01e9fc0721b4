"""One training step over all devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optim_zoo import ranges
from optim_zoo.tree import Tree, wide

LossFn = Callable[[Tree, Tree], Any]


class DataParallelStep:
    """A jitted, donating training step over replicated parameters; made by `data_parallel`.

    ::

        params, state = step.init(params)
        params, state, loss = step(params, state, batch)  # and aux, where there is one
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        mesh: Mesh,
        batch_axis: str,
        micro_batches: int,
        has_aux: bool,
    ) -> None:
        # Whatever the types of the given mesh's axes are (`jax.make_mesh` makes them Explicit):
        # where to cut what lies between is left to the compiler, so that any loss will do.
        automatic = (AxisType.Auto,) * len(mesh.axis_names)
        self._mesh = mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
        self.batch_divisor = mesh.shape[batch_axis] * micro_batches
        self._tx = optax.with_extra_args_support(tx)
        self._loss_fn = loss_fn
        self._micro_batches = micro_batches
        self._has_aux = has_aux
        self._replicated = NamedSharding(mesh, PartitionSpec())
        # A micro-batch is every n-th row, so that splitting a batch moves no row to another device.
        self._rows = NamedSharding(mesh, PartitionSpec(batch_axis))
        self._micro_rows = NamedSharding(mesh, PartitionSpec(None, batch_axis))
        self._step = jax.jit(
            self._update,
            in_shardings=(self._replicated, self._replicated, self._rows),
            out_shardings=self._replicated,
            donate_argnums=(0, 1),
        )

    def init(self, params: Tree) -> tuple[Tree, optax.OptState]:
        """Copies of ``params`` on every device, and the optimizer's state.

        They are copies because a step donates its arguments, and the caller's arrays live on.
        """
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=self._replicated)
        init = jax.jit(self._tx.init, out_shardings=self._replicated)
        with jax.set_mesh(self._mesh):
            # Placed first, because jit takes no array that is committed to other devices.
            params = copy(jax.device_put(params, self._replicated))
            return params, init(params)

    def __call__(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        """``(params, state, loss)`` after one step, and aux where the loss has it.

        Raises:
          ValueError: the batch does not divide over devices and micro-batches.
        """
        for x in jax.tree.leaves(batch):
            rows = jnp.shape(x)[0] if jnp.ndim(x) else 0
            if rows == 0 or rows % self.batch_divisor:
                devices = self.batch_divisor // self._micro_batches
                raise ValueError(
                    f"the first axis of every array in the batch must divide by "
                    f"{self.batch_divisor} ({devices} devices x {self._micro_batches} "
                    f"micro-batches), got shape {jnp.shape(x)}"
                )
        with jax.set_mesh(self._mesh):
            return self._step(params, state, jax.device_put(batch, self._rows))

    def params(self, params: Tree) -> Tree:
        """Plain parameters on one device, as copies: the next step donates what it is given."""

        def plain(x: jax.Array) -> jax.Array:
            shard = x.addressable_data(0)
            return jax.device_put(shard, shard.sharding, may_alias=False)

        return jax.tree.map(plain, params)

    def _update(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        loss, gradients, aux = self._loss_and_gradients(params, batch)
        updates, state = self._tx.update(gradients, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state, loss, aux) if self._has_aux else (params, state, loss)

    def _loss_and_gradients(self, params: Tree, batch: Tree) -> tuple[jax.Array, Tree, Tree]:
        """The mean loss over the global batch, its gradients, and aux."""
        if self._micro_batches == 1:
            (total, (weight, aux)), gradients = self._sums(params, batch)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)

            def add(carry: Tree, micro_batch: Tree) -> tuple[Tree, Tree]:
                (total, (weight, aux)), gradients = self._sums(params, micro_batch)
                return jax.tree.map(jnp.add, carry, (gradients, total, weight)), aux

            start = (zeros, jnp.zeros((), float), jnp.zeros((), float))
            (gradients, total, weight), aux = jax.lax.scan(add, start, self._split(batch))
        # No weight at all (a batch without a masked token): no gradient, rather than 0 / 0.
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
        return total * scale, jax.tree.map(lambda g: wide(g) * scale, gradients), aux

    def _sums(self, params: Tree, batch: Tree) -> tuple[tuple[jax.Array, tuple[Any, Tree]], Tree]:
        def objective(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            value = self._loss_fn(params, batch)
            loss, aux = value if self._has_aux else (value, None)
            total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
            return jnp.asarray(total, float), (jnp.asarray(weight, float), aux)

        return jax.value_and_grad(objective, has_aux=True)(params)

    def _split(self, batch: Tree) -> Tree:
        def rows(x: jax.Array) -> jax.Array:
            x = jnp.reshape(x, (-1, self._micro_batches, *x.shape[1:])).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, self._micro_rows)

        return jax.tree.map(rows, batch)


def data_parallel(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    mode: str = "jit",
    batch_axis: str = "data",
    micro_batches: int = 1,
    has_aux: bool = False,
) -> DataParallelStep:
    """A training step that spreads its batch over ``batch_axis`` of ``mesh``.

    The gradient is that of the mean over the global batch, whatever the devices and micro-batches
    it is cut into.

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns the mean over its batch, or ``(sum, weight)``
        where examples weigh differently (masked tokens): sums and weights are then added over all
        devices and micro-batches before dividing, and zero weight gives a zero gradient.
        Randomness comes as per-example keys in the batch.
      mode: ``"jit"``: jit with `NamedSharding`.
      micro_batches: the batch is worked through in so many equal parts, one after another, with
        gradients summed in float32 or wider: a batch larger than memory in one step.
      has_aux: ``loss_fn`` returns ``(loss, aux)``. With several micro-batches every array of aux
        has them as a new first axis.

    Raises:
      ValueError: an unknown mode or axis.
    """
    if mode != "jit":
        raise ValueError(f"mode must be 'jit', got {mode!r}")
    if batch_axis not in mesh.shape:
        raise ValueError(f"batch_axis must be one of {tuple(mesh.shape)}, got {batch_axis!r}")
    ranges.check_count("micro_batches", micro_batches, 1)
    return DataParallelStep(
        loss_fn, tx, mesh=mesh, batch_axis=batch_axis, micro_batches=micro_batches, has_aux=has_aux
    )
