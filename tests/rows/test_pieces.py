"""The pieces and optimizers of this library with `SparseRows`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import SparseRows, lazy_adam, registry
from tests.rows.problem import assert_same, rows_of

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_learning_rate(rng: np.random.Generator) -> None:
    g = rows_of(rng)
    tx = optim_zoo.scale_by_learning_rate(0.5)
    params = {"t": jnp.ones((6, 3), jnp.bfloat16)}
    for given, dtype in ((None, jnp.float32), (params, jnp.bfloat16)):
        updates, _ = tx.update({"t": g}, tx.init(params), given)
        assert_same(updates["t"], g.with_rows((-0.5 * g.rows).astype(dtype)))


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_that_of_the_dense_gradient(rng: np.random.Generator, max_norm: float) -> None:
    """For the norm, rows of the same id are added, and padding does not count."""
    g = rows_of(rng)
    other = jnp.asarray(rng.normal(size=4), jnp.float32)
    tx = optim_zoo.clip_by_global_norm(max_norm)
    results = []
    for grads in ({"t": g, "w": other}, {"t": g.to_dense(), "w": other}):
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        results.append((updates, state.gradient_norm))
    (updates, norm), (dense, dense_norm) = results
    # A dozen squares are added in another order.
    np.testing.assert_allclose(norm, dense_norm, rtol=1e-6)
    np.testing.assert_allclose(updates["t"].to_dense(), dense["t"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(updates["w"], dense["w"], rtol=1e-6)
    norm_of_all_rows = np.sqrt(np.sum(np.square(g.rows)) + np.sum(np.square(other)))
    assert abs(norm / norm_of_all_rows - 1) > 0.01  # here the two norms differ


def _table_and_bias(rng: np.random.Generator) -> dict[str, jax.Array]:
    return {
        "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
        "t": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
    }


CHAINS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "chain": lambda: optax.chain(optim_zoo.clip_by_global_norm(1.0), lazy_adam(0.1)),
    "masked": lambda: optax.masked(lazy_adam(0.1), {"bias": True, "t": True}),
    "partition": lambda: optax.partition(
        {"rows": lazy_adam(0.1), "rest": optim_zoo.adam(0.1)}, {"bias": "rest", "t": "rows"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lazy_adam)(learning_rate=0.1),
    "with_extra_args_support": lambda: optax.with_extra_args_support(lazy_adam(0.1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_lazy_adam_inside_others(rng: np.random.Generator, name: str) -> None:
    """Rows with a gradient move as in Adam's first steps; the others do not move."""
    params = _table_and_bias(rng)
    g = {"bias": 0.1 * jnp.ones(3), "t": rows_of(rng).with_rows(0.01 * jnp.ones((5, 3)))}
    tx, adam = CHAINS[name](), optim_zoo.adam(0.1)
    state, adam_state = tx.init(params), adam.init(params)
    dense_g = {**g, "t": g["t"].to_dense()}
    moved = expected = params
    for _ in range(3):
        updates, state = jax.jit(tx.update)(g, state, moved)
        assert isinstance(updates["t"], SparseRows)
        moved = optim_zoo.apply_updates(moved, updates)
        adam_updates, adam_state = jax.jit(adam.update)(dense_g, adam_state, expected)
        expected = optim_zoo.apply_updates(expected, adam_updates)
    # float32; the gradient is the same in each step, so that Adam's unseen rows do not move.
    np.testing.assert_allclose(moved["t"], expected["t"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved["bias"], expected["bias"], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(moved["t"] == params["t"])[[2, 3, 5]])
    assert not np.any(np.asarray(moved["t"] == params["t"])[[0, 1, 4]])


@pytest.mark.parametrize("name", [n for n, e in registry.OPTIMIZERS.items() if not e.wraps])
def test_an_optimizer_takes_rows_or_names_their_path(rng: np.random.Generator, name: str) -> None:
    params = {"model": {"t": jnp.ones((6, 3))}}
    tx = registry.get(name).constructor(0.1)
    gradient = rows_of(rng)
    try:
        updates, _ = tx.update({"model": {"t": gradient}}, tx.init(params), params)
    except TypeError as error:
        if "takes no SparseRows, which the gradient of model/t is" not in str(error):
            raise
        assert name not in ("lazy_adam", "sgd")
        return
    update = updates["model"]["t"]
    assert isinstance(update, SparseRows)
    dense = {"model": {"t": gradient.to_dense()}}
    expected, _ = tx.update(dense, tx.init(params), params)
    # The gradients of a row are added in another order.
    np.testing.assert_allclose(update.to_dense(), expected["model"]["t"], rtol=1e-6)
