"""`rows.value_and_grad` on several devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optim_zoo
from optim_zoo import lazy_adam, rows
from tests.rows.problem import TABLES, assert_dense_gradient, table_loss, table_params

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def _train(
    params: Any, batches: jax.Array, place: Callable[[jax.Array], jax.Array]
) -> tuple[Any, jax.Array]:
    tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), lazy_adam(0.1))
    with_grad = rows.value_and_grad(table_loss, TABLES)

    @jax.jit
    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        loss, grads = with_grad(params, ids)
        updates, state = tx.update(grads, state, params)
        return optim_zoo.apply_updates(params, updates), state, loss

    state = tx.init(params)
    losses = []
    for ids in batches:
        params, state, loss = step(params, state, place(ids))
        losses.append(loss)
    return params, jnp.stack(losses)


@pytest.mark.parametrize("what", ["table", "batch", "both"])
def test_sharded_over_devices_under_jit(rng: np.random.Generator, mesh: Mesh, what: str) -> None:
    """Tables and batches that are sharded over their rows have the numbers of one device."""
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = table_params(rng)
    wide = rng.normal(size=(16, 4))
    params["embed"]["word"] = jnp.asarray(wide, jnp.float32)  # 16 rows: two a device
    batches = jnp.asarray(rng.integers(0, 10, size=(3, 8, 3)))
    expected, expected_losses = _train(params, batches, lambda ids: ids)
    placed = jax.device_put(params, replicated)
    if what != "batch":
        placed["embed"]["word"] = jax.device_put(params["embed"]["word"], sharded)
    batch_sharding = replicated if what == "table" else sharded
    actual, losses = _train(placed, batches, lambda ids: jax.device_put(ids, batch_sharding))
    # Sums over 8 devices are added in another order; three steps of Adam in float32.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses, expected_losses)
    jax.tree.map(close, actual, expected)


# Without types, JAX counts a sum over devices once per device for any leaf: not tested.
@pytest.mark.parametrize(("check_vma", "summed"), [(True, False), (True, True), (False, False)])
def test_under_shard_map_rows_are_those_of_one_device(
    rng: np.random.Generator, mesh: Mesh, check_vma: bool, summed: bool
) -> None:
    """Gathered over the devices, they are the gradient of the sum of the losses.

    One read has the same id on all devices; "position" has no other.
    """
    params = {**table_params(rng), "position": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    ids = jnp.asarray(rng.integers(0, 10, size=(16, 3)))

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        position = params["position"][jnp.arange(3)]
        return table_loss(params, ids) + jnp.mean(params["bias"][ids] * position[None, :, 0])

    def local(params: Any, ids: jax.Array) -> Any:
        def mine(params: Any, ids: jax.Array) -> jax.Array:
            value = loss(params, ids)
            return jax.lax.psum(value, "data") if summed else value

        _, grads = rows.value_and_grad(mine, [*TABLES, "position"])(params, ids)
        every = {k: g for k, g in grads.items() if k not in ("kernel", "none")}
        gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), every)
        return jax.tree.map(lambda x: x[None], gathered)

    shard_map = partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    sharded = PartitionSpec("data")
    every = jax.jit(shard_map(local, in_specs=(PartitionSpec(), sharded), out_specs=sharded))(
        params, ids
    )
    total = jax.grad(lambda p: sum(loss(p, ids[i : i + 2]) for i in range(0, 16, 2)))(params)
    expected = {k: total[k] for k in every}
    for device in (0, 7):
        assert_dense_gradient(jax.tree.map(lambda x, i=device: x[i], every), expected)


def test_under_shard_map_where_only_the_loss_varies(rng: np.random.Generator, mesh: Mesh) -> None:
    """In a table of positions, all devices have the same ids, and each has another gradient."""
    table = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def loss(table: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(table[jnp.arange(3)] @ x.T))

    def local(table: jax.Array, x: jax.Array) -> jax.Array:
        _, g = rows.value_and_grad(loss, [""])(table, x)
        return jax.lax.psum(g.to_dense(), "data")

    replicated, sharded = PartitionSpec(), PartitionSpec("data")
    total = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(replicated, sharded), out_specs=replicated)
    )
    expected = jax.grad(loss)(table, x)
    np.testing.assert_allclose(total(table, x), expected, rtol=1e-5, atol=1e-6)
