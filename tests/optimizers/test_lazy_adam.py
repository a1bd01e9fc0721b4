import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import SparseRows, adam, lazy_adam
from tests.optimizers.problems import Arrays, assert_same_path, problem, schedule, train_in_float64
from tests.reference import lazy_adam as reference

SHAPES = {"table": (6, 3), "column": (6,), "blocks": (6, 2, 2), "dense": (4,)}
Pair = tuple[np.ndarray, np.ndarray]


def _tables(rng: np.random.Generator) -> tuple[Arrays, list[dict[str, np.ndarray | Pair]]]:
    """Returns tables and gradients with repeated ids, padding (id 6) and steps without ids.

    Row 5 has its first gradient in step 7. The steps have 5 ids or none, because each number of ids
    is compiled anew.
    """
    params = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    ids = [
        [0, 1, 0, 6, 6],
        [6, 6, 6, 6, 6],
        [2, 2, 2, 4, 1],
        [],
        [3, 6, 0, 6, 6],
        [1, 6, 1, 6, 0],
        [5, 5, 4, 6, 6],
        [6, 6, 5, 6, 6],
        [0, 6, 6, 6, 6],
        [6, 6, 6, 6, 5],
    ]
    grads: list[dict[str, np.ndarray | Pair]] = []
    for step in ids:
        g: dict[str, np.ndarray | Pair] = {"dense": rng.normal(size=SHAPES["dense"])}
        for name in ("table", "column", "blocks"):
            rows = rng.normal(size=(len(step), *SHAPES[name][1:]))
            g[name] = np.asarray(step, np.int32), rows
        grads.append(g)
    return params, grads


def _sparse(g: dict[str, np.ndarray | Pair]) -> dict[str, object]:
    return {k: SparseRows(*v, 6) if isinstance(v, tuple) else jnp.asarray(v) for k, v in g.items()}


@pytest.mark.parametrize("arguments", [{}, {"b1": 0.7, "b2": 0.8, "eps": 1e-3}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = _tables(rng)
    with jax.enable_x64(True):
        sparse = [_sparse(g) for g in grads]
    trajectory = train_in_float64(lambda: lazy_adam(schedule, **arguments), params, sparse)
    assert_same_path(
        trajectory, reference.lazy_adam(params, grads, learning_rate=schedule, **arguments)
    )


def test_lazy_adam_equals_adam_if_every_row_has_a_gradient(rng: np.random.Generator) -> None:
    params, _ = _tables(rng)
    dense = [{k: rng.normal(size=s) for k, s in SHAPES.items()} for _ in range(10)]
    # Every row occurs twice, in random order, each time with half of its gradient.
    with jax.enable_x64(True):
        sparse = []
        for g in dense:
            order = rng.permutation(np.repeat(np.arange(6, dtype=np.int32), 2))
            halves = {k: (order, g[k][order] / 2) for k in SHAPES if k != "dense"}
            sparse.append(_sparse({**halves, "dense": g["dense"]}))
    expected = train_in_float64(lambda: adam(schedule, 0.7, 0.8, 1e-3), params, dense)
    for grads in (sparse, dense):
        trajectory = train_in_float64(lambda: lazy_adam(schedule, 0.7, 0.8, 1e-3), params, grads)
        assert_same_path(trajectory, expected)


def test_lazy_adam_equals_adam_for_dense_gradients(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        *(train_in_float64(lambda f=f: f(schedule), params, grads) for f in (lazy_adam, adam))
    )


def test_rows_without_a_gradient_keep_every_bit(rng: np.random.Generator) -> None:
    params = {"table": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)}
    tx = lazy_adam(0.1)
    update = jax.jit(tx.update)
    _, state = update({"table": jnp.ones((5, 2))}, tx.init(params), params)
    gradient = SparseRows(np.asarray([1, 5, 3, 1]), np.ones((4, 2), np.float32), 5)
    updates, after = update({"table": gradient}, state, params)
    moved = optim_zoo.apply_updates(params, updates)
    touched = [False, True, False, True, False]
    before_and_after = [
        (params["table"], moved["table"]),
        *((optax.tree.get(s, name)["table"] for s in (state, after)) for name in ("mu", "nu")),
    ]
    for before, now in before_and_after:
        assert before.shape == now.shape
        np.testing.assert_array_equal(np.any(np.asarray(before != now), axis=1), touched)


def test_state_and_updates_keep_their_structure() -> None:
    """The step can run in a scan, and the updates of a table remain sparse."""
    params = {"table": jnp.ones((1000, 2))}
    tx = lazy_adam(0.1)
    state = tx.init(params)
    gradient = {"table": SparseRows(np.asarray([7, 9]), np.ones((2, 2), np.float32), 1000)}
    updates, after = jax.jit(tx.update)(gradient, state, params)
    assert isinstance(updates["table"], SparseRows)
    assert updates["table"].rows.shape == (2, 2)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), after, state
    )
