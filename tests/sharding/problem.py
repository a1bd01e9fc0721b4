"""A small problem that the tests of this folder share: meshes, losses, training, comparison."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from optim_zoo import sharding
from optim_zoo.sharding import WeightedLoss
from optim_zoo.sharding.losses import loss_and_aux

# Sums over devices and micro-batches are added in another order: about 1e-7 of the largest entries.
RTOL = 2e-6


def data_mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def mean_loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def weighted_loss(params: Any, batch: Any) -> WeightedLoss:
    hidden = jnp.tanh(batch["x"] @ params["hidden"])
    losses = jnp.mean((hidden @ params["out"] - batch["y"]) ** 2, axis=-1)
    return WeightedLoss(jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"]))


def many_params(rng: np.random.Generator) -> Any:
    """Parameters of several ranks; 8 devices divide a dimension of some of them."""
    shapes = {"hidden": (4, 16), "out": (16, 2), "bias": (16,), "odd": (3, 5), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}


def many_loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None])
    odd = params["scale"] * jnp.sum(params["odd"] ** 2)
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2) + 0.01 * odd


# Rules that shard those of `many_params` whose dimensions 8 devices divide.
FSDP = [("hidden", P(None, "data")), ("out", P("data")), ("bias", P("data"))]


def train(
    step: sharding.DataParallelStep, params: Any, batches: list[Any]
) -> tuple[Any, np.ndarray]:
    params, state = step.init(params)
    losses = []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return step.params(params), np.asarray(losses)


@functools.cache
def _stepon_one_device(loss_fn: Any, make: Any) -> Any:
    """Returns the optimizer and its step on the global batch, compiled once for all tests."""
    tx = make()

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def mean(params: Any) -> jax.Array:
            loss, _ = loss_and_aux(loss_fn(params, batch), has_aux=False)
            return loss.total / loss.weight

        loss, grads = jax.value_and_grad(mean)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return tx, step


def on_one_device(
    loss_fn: Any, make: Any, params: Any, batches: list[Any]
) -> tuple[Any, np.ndarray]:
    """Trains on the global batch at once, without `data_parallel`."""
    tx, step = _stepon_one_device(loss_fn, make)
    state = tx.init(params)
    losses = []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, np.asarray(losses)


def assert_same(actual: Any, expected: Any) -> None:
    def assert_leaf_same(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, RTOL, RTOL * np.abs(y).max())

    jax.tree.map(assert_leaf_same, actual, expected)
