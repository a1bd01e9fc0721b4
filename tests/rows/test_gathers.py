"""`rows.value_and_grad` of losses that use a table as an array, as Flax's embedding layers do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optim_zoo import rows

pytestmark = pytest.mark.usefixtures("quick_to_compile")

IDS = jnp.asarray([[1, 2, 2], [3, -1, 1]])  # -1 is the last row for JAX


def _dense(grads: Any) -> Any:
    return jax.tree.map(
        lambda g: g.to_dense() if rows.is_sparse(g) else g, grads, is_leaf=rows.is_sparse
    )


def _assert_gradient(loss: Callable[..., Any], tables: list[str], params: Any) -> Any:
    """Checks value and gradient against JAX's, outside and inside ``jit``; returns the gradient."""
    expected_value, expected = jax.value_and_grad(loss)(params)
    ours = rows.value_and_grad(loss, tables)
    for with_grad in (ours, jax.jit(ours)):
        value, grads = with_grad(params)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        # float32, added in another order.
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, _dense(grads), expected)
    return grads


class Model(nn.Module):
    """Two tables, one read twice, and a layer behind them."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        words = nn.Embed(10, 4, name="words")
        positions = nn.Embed(3, 4, name="positions")(jnp.arange(ids.shape[1]))
        x = words(ids) * words(ids[:, :1]) + positions[None]
        return nn.Dense(2, use_bias=False)(jnp.tanh(x))


def test_linen_embed() -> None:
    model = Model()
    params = model.init(jax.random.key(0), IDS)
    grads = _assert_gradient(
        lambda params: jnp.mean(model.apply(params, IDS) ** 2), ["embedding$"], params
    )["params"]
    np.testing.assert_array_equal(
        grads["words"]["embedding"].ids, [1, 2, 2, 3, 9, 1, 1, 3]
    )  # in the order of the reads, -1 as the last row
    np.testing.assert_array_equal(grads["positions"]["embedding"].ids, [0, 1, 2])
    assert isinstance(grads["Dense_0"]["kernel"], jax.Array)


def test_nnx_embed() -> None:
    graph, params = nnx.split(nnx.Embed(10, 4, rngs=nnx.Rngs(0)))
    grads = _assert_gradient(
        lambda params: jnp.mean(jnp.tanh(nnx.merge(graph, params)(IDS))), ["embedding"], params
    )
    assert rows.is_sparse(jax.tree.leaves(grads, is_leaf=rows.is_sparse)[0])


def test_rows_that_are_cast_have_gradients_in_the_dtype_of_the_table() -> None:
    """`Embed(dtype=bfloat16)` casts the whole table; the rows are cast alone, to the same bits."""
    model = nn.Embed(10, 4, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), IDS)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply(params, jnp.asarray([5, 0])).astype("float32") ** 2)

    value, grads = rows.value_and_grad(loss, ["embedding"])(params)
    expected_value, expected = jax.value_and_grad(loss)(params)
    assert value == expected_value
    assert grads["params"]["embedding"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, _dense(grads), expected)


def test_tied_output_embeddings_are_refused() -> None:
    model = nn.Embed(10, 4)
    params = model.init(jax.random.key(0), IDS)

    def loss(params: Any) -> jax.Array:
        x = model.apply(params, IDS)
        return jnp.sum(model.apply(params, x, method="attend"))

    message = r"the table params/embedding as table\[ids\].*Embed\.attend.*leave it out of tables"
    with pytest.raises(TypeError, match=message):
        rows.value_and_grad(loss, ["embedding"])(params)


TAKES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "index": lambda t, ids: t[ids],
    "clip": lambda t, ids: jnp.take(t, ids, axis=0, mode="clip"),
    "wrap": lambda t, ids: jnp.take(t, ids, axis=0, mode="wrap"),
    "fill": lambda t, ids: jnp.take(t, ids, axis=0, mode="fill", fill_value=0),
    "drop": lambda t, ids: t.at[ids].get(mode="drop", fill_value=2.0),
    "jit": lambda t, ids: jax.jit(lambda t: t[ids])(t),
    "vmap": lambda t, ids: jax.vmap(lambda i: t[i])(ids),
    "cast": lambda t, ids: t.astype("float16").astype("float32")[ids],
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("shape", [(4, 2), (4,)], ids=str)
def test_gathers_of_every_kind(
    rng: np.random.Generator, take: Callable[..., jax.Array], shape: tuple[int, ...]
) -> None:
    """Ids below and above the table have the value and the gradient that JAX gives them."""
    ids = jnp.asarray([[1, 5, -1], [-9, 3, 3]])
    # Small whole numbers, which float16 holds without rounding.
    table = jnp.asarray(rng.integers(1, 9, shape), jnp.float32)
    weights = jnp.asarray(rng.integers(1, 9, (*ids.shape, *shape[1:])), jnp.float32)
    _assert_gradient(lambda t: jnp.sum(take(jnp.asarray(t), ids) * weights), [""], table)


@pytest.mark.parametrize(
    "read",
    [
        lambda t, ids: jax.lax.map(lambda i: t[i], ids),
        lambda t, ids: jax.checkpoint(lambda: t[ids])(),
        lambda t, ids: jax.lax.cond(ids[0] > 0, lambda: t[ids], lambda: t[ids]),
    ],
    ids=["scan", "checkpoint", "cond"],
)
def test_gathers_inside_a_transformation_are_refused(read: Any) -> None:
    ids = jnp.asarray([1, 2])
    with_grad = rows.value_and_grad(lambda p: jnp.sum(read(jnp.asarray(p["t"]), ids)), ["t"])
    with pytest.raises(ValueError, match="the table t is read inside an inner scan"):
        with_grad({"t": jnp.ones((4, 4))})


def test_a_layer_around_the_table_may_use_remat_and_scan() -> None:
    """Only the gather itself must be outside of them."""
    table, ids = jnp.linspace(0.0, 1.0, 8).reshape(4, 2), jnp.asarray([0, 3, 3])

    def loss(table: Any) -> jax.Array:
        x = jax.checkpoint(jnp.tanh)(jnp.take(jnp.asarray(table), ids, axis=0))
        return jax.lax.scan(lambda total, x: (total + jnp.sum(x**2), None), 0.0, x)[0]

    _assert_gradient(loss, [""], table)


def test_under_shard_map() -> None:
    """The rows of each device's own batch, which add up to the gradient of the summed loss."""
    model = nn.Embed(10, 4)
    ids = jnp.arange(16).reshape(8, 2) % 7
    params = model.init(jax.random.key(0), ids)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(model.apply(params, ids)) ** 2)

    def local(params: Any, ids: jax.Array) -> Any:
        _, grads = rows.value_and_grad(loss, ["embedding"])(params, ids)
        return jax.lax.psum(_dense(grads), "data")

    mesh = Mesh(np.array(jax.devices()), ("data",))
    total = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    expected = jax.grad(loss)(params, ids)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, total(params, ids), expected)


def test_no_array_of_a_tables_size_is_made() -> None:
    """Neither is the cast of the table, which Flax's layer asks for."""
    model = nn.Embed(12_345, 4, dtype=jnp.bfloat16)
    params = {"params": {"embedding": jnp.ones((12_345, 4))}}

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply(params, IDS).astype("float32"))

    def made(function: Any) -> bool:
        equations = str(jax.make_jaxpr(function)(params)).split("let", 1)[1]
        return any("[12345,4] = " in line for line in equations.splitlines())

    assert made(jax.value_and_grad(loss))
    assert not made(rows.value_and_grad(loss, ["embedding"]))
