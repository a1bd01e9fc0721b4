"""A small problem that the tests of this folder share: a mesh, losses, and a comparison."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from optim_zoo.sharding import WeightedLoss

# Sums over devices and micro-batches add in another order: about 1e-7 of the largest entries.
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


def assert_same(actual: Any, expected: Any) -> None:
    def assert_leaf_same(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, RTOL, RTOL * np.abs(y).max())

    jax.tree.map(assert_leaf_same, actual, expected)
