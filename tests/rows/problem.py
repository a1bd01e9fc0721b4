"""Rows and comparisons that the tests of this folder share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo import SparseRows, rows

NUM_ROWS = 6
IDS = np.array([4, 1, 6, 1, 0], np.int32)  # 1 twice, padding in the middle


def rows_of(
    rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: Any = np.float32
) -> SparseRows:
    return SparseRows(IDS, jnp.asarray(rng.normal(size=(len(IDS), *shape)), dtype), NUM_ROWS)


def dense_by_numpy(g: SparseRows) -> np.ndarray:
    """Returns the whole array in float64, computed by NumPy alone."""
    dense = np.zeros(g.shape)
    known = np.asarray(g.ids) < g.num_rows
    np.add.at(dense, np.asarray(g.ids)[known], np.asarray(g.rows, np.float64)[known])
    return dense


def assert_same(actual: SparseRows, expected: SparseRows) -> None:
    assert actual.num_rows == expected.num_rows
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.rows, expected.rows)


def table_params(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "embed": {"word": jnp.asarray(rng.normal(size=(10, 4)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=10), jnp.float32),
        "blocks": jnp.asarray(rng.normal(size=(10, 2, 4)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
        "none": None,
    }


TABLES = ["^embed/word$", "^bias$", "^blocks$"]


def table_loss(params: Any, ids: jax.Array, *, power: float = 1.5) -> Any:
    """Reads tables with ids of rank 2, 1 and 0, and one table by several ids."""
    word, bias, blocks = params["embed"]["word"], params["bias"], params["blocks"]
    x = jnp.tanh(word[ids] @ params["kernel"])
    x = x * word[ids[:, 0]][:, None] + blocks[ids].sum(-2) + word[jnp.asarray(3)][None, None]
    return jnp.mean(jnp.abs(x) ** power) + jnp.sum(bias[ids] ** 2) + bias[np.int32(2)]


def assert_dense_gradient(grads: Any, expected: Any) -> None:
    assert jax.tree.structure(grads, is_leaf=rows.is_sparse) == jax.tree.structure(expected)
    dense = jax.tree.map(
        lambda g: g.to_dense() if rows.is_sparse(g) else g, grads, is_leaf=rows.is_sparse
    )
    # float32, added in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), dense, expected)
