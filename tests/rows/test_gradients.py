"""`rows.value_and_grad`, on one device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim_zoo
from optim_zoo import lazy_adam, rows
from tests.rows.problem import TABLES, assert_dense_gradient, table_loss, table_params

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Loss = Callable[..., Any]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_gradient_is_the_dense_one(rng: np.random.Generator, jit: bool) -> None:
    params, ids = table_params(rng), jnp.asarray([[1, 2, 3], [2, 2, 9]])
    ours: Any = rows.value_and_grad(table_loss, TABLES)
    theirs: Any = jax.jit(jax.value_and_grad(table_loss))
    for kwargs in ({}, {"power": 2.0}):
        value, grads = (jax.jit(ours) if jit else ours)(params, ids, **kwargs)
        expected_value, expected = theirs(params, ids, **kwargs)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        assert [rows.is_sparse(grads[k]) for k in ("bias", "blocks", "kernel")] == [1, 1, 0]
        assert_dense_gradient(grads, expected)
        # Reads in order: six ids, two, one.
        np.testing.assert_array_equal(grads["embed"]["word"].ids, [1, 2, 3, 2, 2, 9, 1, 2, 3])


def test_some_tables_only(rng: np.random.Generator) -> None:
    """A leaf that no pattern matches is an array in the loss and has a dense gradient."""
    params, ids = table_params(rng), jnp.asarray([[1, 2]])
    _, grads = rows.value_and_grad(table_loss, ["word"])(params, ids)
    assert isinstance(grads["bias"], jax.Array)
    assert_dense_gradient(grads, jax.jit(jax.grad(table_loss))(params, ids))


def test_has_aux(rng: np.random.Generator) -> None:
    params, ids = table_params(rng), jnp.asarray([[1, 2]])

    def loss(params: Any, ids: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return table_loss(params, ids), {"rows": params["embed"]["word"][ids], "n": ids.size}

    (value, aux), grads = rows.value_and_grad(loss, TABLES, has_aux=True)(params, ids)
    (expected_value, expected_aux), expected = jax.value_and_grad(loss, has_aux=True)(params, ids)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_array_equal(aux["rows"], expected_aux["rows"])
    assert aux["n"] == 2
    assert_dense_gradient(grads, expected)


def test_a_table_that_is_never_read(rng: np.random.Generator) -> None:
    params = {"read": jnp.ones((4, 2)), "unread": jnp.ones((5, 3), jnp.bfloat16)}
    with_grad = rows.value_and_grad(lambda p: p["read"][jnp.asarray([1])].sum(), [".*"])
    for _, grads in (with_grad(params), jax.jit(with_grad)(params)):
        assert grads["unread"].rows.shape == (0, 3)
        assert grads["unread"].shape == (5, 3)
        assert grads["unread"].dtype == jnp.bfloat16
    tx = lazy_adam(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optim_zoo.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["unread"], params["unread"])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_ids_outside_the_table_read_zeros_and_have_no_gradient(jit: bool) -> None:
    table = jnp.asarray(np.arange(1, 9, dtype=np.float32).reshape(4, 2))
    ids = np.asarray([[4, -1], [1, 9]])

    def loss(p: jax.Array, ids: Any) -> tuple[jax.Array, jax.Array]:
        seen = p[ids]
        return 3 * seen.sum(), seen

    with_grad: Any = rows.value_and_grad(loss, [""], has_aux=True)
    (_, seen), g = (jax.jit(with_grad) if jit else with_grad)(table, ids)
    np.testing.assert_array_equal(seen, [[[0, 0], [0, 0]], [[3, 4], [0, 0]]])
    np.testing.assert_array_equal(g.ids, [4, 4, 1, 4])
    np.testing.assert_array_equal(g.to_dense(), [[0, 0], [3, 3], [0, 0], [0, 0]])


def _sizes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Returns the shape of every array that a jaxpr makes, also inside its parts."""
    made = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "shape")}
    for part in _parts(jaxpr):
        made |= _sizes(part)
    return made


def _parts(jaxpr: Any) -> list[Any]:
    values = [v for eqn in jaxpr.eqns for v in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)]
    return [getattr(v, "jaxpr", v) for v in values if _is_jaxpr(v)]


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_no_array_of_a_tables_size_is_made(rng: np.random.Generator) -> None:
    """In neither pass. The same search finds those of the dense gradient."""
    params = {"t": jnp.ones((12_345, 4)), "w": jnp.ones((4, 4))}
    ids = jnp.asarray([1, 2, 3])

    def loss(p: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(p["t"][ids] @ p["w"]) * p["t"][ids + 1])

    ours = jax.make_jaxpr(rows.value_and_grad(loss, ["^t$"]))(params, ids)
    theirs = jax.make_jaxpr(jax.value_and_grad(loss))(params, ids)
    assert {s for s in _sizes(theirs.jaxpr) if 12_345 in s} == {(12_345, 4)}
    assert {s for s in _sizes(ours.jaxpr) if 12_345 in s} == set()
    assert (3, 4) in _sizes(ours.jaxpr)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, ids: p["t"][ids] @ p["t"].T, r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"][ids] @ p["t"], r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"].astype(jnp.bfloat16)[ids], r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"].at[ids].get(), r"table a/t as table\[ids\]"),
        (lambda p, ids: sum(x.sum() for x in p["t"]), r"table a/t as table\[ids\]"),
        (lambda p, ids: jnp.asarray(p["t"]), r"table a/t as table\[ids\]"),
        (lambda p, ids: np.asarray(p["t"]), r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"] ** 2, "'Table'"),
        (lambda p, ids: jnp.asarray(p["t"])[1:3], r"table a/t as table\[ids\]"),
        (lambda p, ids: jnp.asarray(p["t"])[ids, 0], r"table a/t as table\[ids\]"),
        (lambda p, ids: jnp.take(jnp.asarray(p["t"]), ids, axis=1), r"table a/t as table\[ids\]"),
        (lambda p, ids: jnp.square(jnp.asarray(p["t"])), r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"][1:3], r"by an array of integer ids, got slice\(1, 3, None\)"),
        (lambda p, ids: p["t"][1.0], r"by an array of integer ids, got 1\.0"),
        (lambda p, ids: p["t"][ids / 2], "by an array of integer ids, got .*float32"),
        (lambda p, ids: p["t"][ids > 2], "by an array of integer ids, got .*bool"),
        (lambda p, ids: p["t"][True], "by an array of integer ids, got True"),
        (lambda p, ids: p["t"][...], r"table a/t as table\[ids\]"),
        (lambda p, ids: p["t"][None], "by an array of integer ids, got None"),
        (lambda p, ids: p["t"][ids, 0], "by an array of integer ids, got "),
        (lambda p, ids: p["t"][[1, 2]], r"by an array of integer ids, got \[1, 2\]"),
    ],
)
def test_a_table_read_in_another_way_raises(loss: Loss, message: str, jit: bool) -> None:
    params, ids = {"a": {"t": jnp.ones((4, 4))}}, jnp.asarray([1, 2])
    with_grad: Any = rows.value_and_grad(lambda p, ids: jnp.sum(loss(p["a"], ids)), ["t"])
    with pytest.raises(TypeError, match=message):
        (jax.jit(with_grad) if jit else with_grad)(params, ids)


def test_a_function_that_needs_an_array_raises() -> None:
    """JAX's own error, which advises to convert the table to an array; then its uses are seen."""
    params, ids = {"t": jnp.ones((4, 4))}, jnp.asarray([1, 2])
    for loss in (lambda t: jnp.take(t, ids, axis=0), jnp.square):
        with pytest.raises(ValueError, match=r"explicitly convert your object using jax\.numpy"):
            rows.value_and_grad(lambda p, loss=loss: jnp.sum(loss(p["t"])), ["t"])(params)


def _inside_scan(t: Any, ids: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda total, i: (total + t[i].sum(), None), 0.0, ids)[0]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "loss",
    [
        _inside_scan,
        lambda t, ids: jax.vmap(lambda i: t[i])(ids),
        lambda t, ids: jax.jit(lambda i: t[i])(ids),
        lambda t, ids: jax.checkpoint(lambda i: t[i])(ids),
        lambda t, ids: jax.lax.cond(ids[0] > 0, lambda: t[ids].sum(), lambda: 0.0),
        lambda t, ids: jax.grad(lambda w: (w * t[ids]).sum())(1.0),
    ],
    ids=["scan", "vmap", "jit", "checkpoint", "cond", "grad"],
)
def test_a_table_read_inside_a_transformation_raises(loss: Loss, jit: bool) -> None:
    with_grad: Any = rows.value_and_grad(lambda p, ids: jnp.sum(loss(p["t"], ids)), ["t"])
    with pytest.raises(ValueError, match="the table t is read inside an inner scan"):
        (jax.jit(with_grad) if jit else with_grad)({"t": jnp.ones((4, 4))}, jnp.asarray([1, 2]))


def test_a_loss_may_ask_a_table_for_its_size() -> None:
    def loss(p: Any) -> jax.Array:
        t = p["t"]
        assert (t.shape, t.ndim, t.dtype, len(t)) == ((4, 2), 2, jnp.float32, 4)
        return t[jnp.asarray([0])].sum()

    rows.value_and_grad(loss, ["t"])({"t": jnp.ones((4, 2))})


def test_patterns_that_name_no_table() -> None:
    params = {"t": jnp.ones((4, 2)), "scale": jnp.ones(())}

    def loss(p: Any) -> jax.Array:
        return p["t"][jnp.asarray([0])].sum()

    with pytest.raises(ValueError, match=r"tables: 'embed' matches no leaf.*t"):
        rows.value_and_grad(loss, ["embed"])(params)
    with pytest.raises(ValueError, match=r"scale has no rows, its shape is \(\)"):
        rows.value_and_grad(loss, ["scale"])(params)
    with pytest.raises(TypeError, match="tables must be a list"):
        rows.value_and_grad(loss, "t")


def test_derivatives_of_it_reach_the_table(rng: np.random.Generator) -> None:
    """The loss that is returned can be differentiated, as that of jax.value_and_grad."""
    params, ids = table_params(rng), jnp.asarray([[1, 2]])
    actual = jax.grad(lambda p: rows.value_and_grad(table_loss, TABLES)(p, ids)[0])(params)
    expected = jax.jit(jax.grad(table_loss))(params, ids)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_gradient_for_each_example(rng: np.random.Generator) -> None:
    params, ids = table_params(rng), jnp.asarray(rng.integers(0, 10, size=(5, 1, 3)))
    with_grad = rows.value_and_grad(table_loss, TABLES)
    _, grads = jax.jit(jax.vmap(with_grad, in_axes=(None, 0)))(params, ids)
    expected = jax.jit(jax.vmap(jax.grad(table_loss), in_axes=(None, 0)))(params, ids)
    for i in range(5):
        mine, its = jax.tree.map(lambda x, i=i: x[i], (grads, expected))
        assert_dense_gradient(mine, its)


def test_numpy_parameters(rng: np.random.Generator) -> None:
    params, ids = table_params(rng), np.asarray([[1, 2]])
    _, grads = rows.value_and_grad(table_loss, TABLES)(jax.tree.map(np.asarray, params), ids)
    assert_dense_gradient(grads, jax.grad(table_loss)(params, jnp.asarray(ids)))
