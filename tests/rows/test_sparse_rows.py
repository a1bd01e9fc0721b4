"""`SparseRows`, and what transformations of other libraries do with them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import optim_zoo
from optim_zoo import SparseRows, lazy_adam, rows
from tests.rows.problem import IDS, NUM_ROWS, assert_same, dense_by_numpy, rows_of

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_attributes(rng: np.random.Generator) -> None:
    g = rows_of(rng, (3, 2))
    np.testing.assert_array_equal(g.ids, IDS)
    assert g.ids.dtype == jnp.int32
    assert g.shape == (6, 3, 2)
    assert jnp.shape(g) == (6, 3, 2)
    assert g.dtype == jnp.float32
    assert g.num_rows == 6
    assert repr(g) == "SparseRows(ids=(5,), rows=(5, 3, 2), num_rows=6)"
    assert repr(jax.tree.map(lambda _: None, g)) == "SparseRows(ids=None, rows=None, num_rows=6)"


@pytest.mark.parametrize(
    ("ids", "shape", "num_rows", "error", "message"),
    [
        ([0], (1, 2), 6.0, TypeError, r"num_rows must be a whole number, got 6\.0"),
        ([0], (1, 2), True, TypeError, "num_rows must be a whole number, got True"),
        ([], (0, 2), -1, ValueError, r"num_rows must be in \[0, 2\*\*31\), got -1"),
        ([0], (1, 2), 2**31, ValueError, "got 2147483648"),
        ([0.0], (1, 2), 6, TypeError, "ids must be integers, got float64"),
        ([[0]], (1, 2), 6, ValueError, r"got \(1, 1\) and \(1, 2\)"),
        ([0, 1], (1, 2), 6, ValueError, r"got \(2,\) and \(1, 2\)"),
        ([0], (), 6, ValueError, r"got \(1,\) and \(\)"),
        ([0, 7], (2, 2), 6, ValueError, r"ids must be in \[0, 6\], 6 being padding, got 7"),
        ([-1], (1,), 6, ValueError, "got -1"),
        ([2**32], (1,), 6, ValueError, "got 4294967296"),
    ],
)
def test_what_does_not_fit(
    ids: list, shape: tuple[int, ...], num_rows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SparseRows(np.asarray(ids) if ids else np.zeros(0, int), np.zeros(shape), num_rows)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_ids_of_any_integer_type(dtype: Any) -> None:
    """Also types that are too narrow for num_rows."""
    g = SparseRows(np.asarray([3, 100], dtype), np.ones((2, 2), np.float32), 100_000)
    np.testing.assert_array_equal(g.ids, [3, 100])
    assert g.ids.dtype == jnp.int32


def test_ids_at_the_far_end() -> None:
    last = 2**31 - 2
    g = SparseRows(np.asarray([0, last, last + 1]), np.ones(3, np.float32), last + 1)
    np.testing.assert_array_equal(g.ids, [0, last, last + 1])


def test_traced_ids_out_of_range_are_padding() -> None:
    """Ids do not wrap around: -1 is not the last row, and 2**32 is not the first."""

    @jax.jit
    def dense(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        g = SparseRows(ids, jnp.ones(len(ids)), 6)
        return g.ids, g.to_dense()

    low, high = -(2**31), 2**31 - 1
    ids, array = dense(jnp.asarray([-1, 7, low, high, 2, 6], jnp.int32))
    np.testing.assert_array_equal(ids, [6, 6, 6, 6, 2, 6])
    np.testing.assert_array_equal(array, [0, 0, 1, 0, 0, 0])
    ids, _ = dense(jnp.asarray([2**32 - 1, 5], jnp.uint32))
    np.testing.assert_array_equal(ids, [6, 5])
    narrow = jax.jit(lambda ids: SparseRows(ids, jnp.ones(2), 1000).ids)
    np.testing.assert_array_equal(narrow(jnp.asarray([-1, 100], jnp.int8)), [1000, 100])
    with jax.enable_x64(True):
        ids, _ = dense(jnp.asarray([2**32, 5, -(2**33) + 1], jnp.int64))
    np.testing.assert_array_equal(ids, [6, 5, 6])


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_to_dense(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    g = rows_of(rng, shape)
    # Two float32 rows added: half an ulp of what is near 1.
    np.testing.assert_allclose(g.to_dense(), dense_by_numpy(g), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_merged(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    g = rows_of(rng, shape)
    for merged in (g.merged(), jax.jit(SparseRows.merged)(g)):
        np.testing.assert_array_equal(merged.ids, [0, 1, 4, 6, 6])
        np.testing.assert_array_equal(merged.rows[3:], np.zeros((2, *shape)))
        np.testing.assert_allclose(dense_by_numpy(merged), dense_by_numpy(g), rtol=1e-6, atol=1e-7)
        assert merged.shape == g.shape


@pytest.mark.parametrize(
    "ids", [[], [6], [6, 6], [3], [0, 0, 0], [5, 4, 3, 2, 1, 0], [6, 5, 5, 6, 0]]
)
def test_merged_of_any_ids(rng: np.random.Generator, ids: list[int]) -> None:
    array = np.asarray(ids, np.int32)
    g = SparseRows(array, np.float32(rng.normal(size=(len(ids), 2))), NUM_ROWS)
    merged = g.merged()
    unique = sorted(set(ids) - {6})
    np.testing.assert_array_equal(merged.ids, unique + [6] * (len(ids) - len(unique)))
    np.testing.assert_allclose(dense_by_numpy(merged), dense_by_numpy(g), rtol=1e-6, atol=1e-7)


def test_many_ids_merge_as_numpy_has_them(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 1001, size=3000)
    g = SparseRows(ids, np.float32(rng.normal(size=(3000, 2))), 1000)
    merged = jax.jit(SparseRows.merged)(g)
    unique = np.unique(ids[ids < 1000])
    np.testing.assert_array_equal(merged.ids[: len(unique)], unique)
    np.testing.assert_array_equal(merged.ids[len(unique) :], 1000)
    # A dozen float32 rows of size 1 are added.
    np.testing.assert_allclose(dense_by_numpy(merged), dense_by_numpy(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 256])
def test_low_precision_rows_are_added_in_float32(n: int) -> None:
    """In bfloat16, 256 + 1 is 256."""
    values = jnp.asarray([256.0] + [1.0] * (n - 1) if n else [], jnp.bfloat16)
    merged = SparseRows(np.zeros(n, np.int32), values, 3).merged()
    assert merged.dtype == jnp.float32
    assert float(merged.to_dense()[0]) == (256 + n - 1 if n else 0)


def test_other_rows_under_the_same_ids(rng: np.random.Generator) -> None:
    g = rows_of(rng)
    other = g.with_rows(2 * g.rows)
    assert_same(other, SparseRows(IDS, 2 * np.asarray(g.rows), NUM_ROWS))


def test_a_tree_of_rows_and_opaque_ids(rng: np.random.Generator) -> None:
    g = rows_of(rng)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path({"t": g})]
    assert paths == ["['t'].rows", "['t'].ids"]
    assert_same(jax.tree.map(lambda x: x, g), g)
    again = jax.tree.unflatten(jax.tree.structure(g), jax.tree.leaves(g))
    assert_same(again, g)
    other = SparseRows(IDS, g.rows, 7)
    assert jax.tree.structure(g) != jax.tree.structure(other)


def test_through_jit_donation_and_eval_shape(rng: np.random.Generator) -> None:
    g = rows_of(rng)
    shapes = jax.eval_shape(lambda g: g, g)
    assert isinstance(shapes, SparseRows)
    assert (shapes.shape, shapes.dtype, shapes.num_rows) == (g.shape, g.dtype, g.num_rows)
    expected = SparseRows(np.asarray(g.ids), np.asarray(g.rows), NUM_ROWS)
    moved = jax.jit(lambda g: g.with_rows(g.rows + 0), donate_argnums=0)(g)
    assert g.rows.is_deleted()
    assert_same(moved, expected)


def test_through_scan_and_cond(rng: np.random.Generator) -> None:
    g = rows_of(rng)

    def double(g: SparseRows, _: None) -> tuple[SparseRows, SparseRows]:
        return g.with_rows(2 * g.rows), g

    last, seen = jax.lax.scan(double, g, None, length=3)
    assert_same(last, g.with_rows(8 * g.rows))
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], seen), g.with_rows(2**i * g.rows))
    assert_same(jax.lax.cond(True, lambda g: g, lambda g: double(g, None)[0], g), g)


def test_through_vmap(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 7, size=(4, 5))
    values = np.float32(rng.normal(size=(4, 5, 3)))

    def both(ids: jax.Array, values: jax.Array) -> tuple[SparseRows, jax.Array]:
        g = SparseRows(ids, values, 6)
        return g, g.merged().to_dense()

    many, dense = jax.vmap(both)(jnp.asarray(ids), values)
    np.testing.assert_array_equal(many.ids, ids)
    for i in range(4):
        expected = dense_by_numpy(SparseRows(ids[i], values[i], 6))
        np.testing.assert_allclose(dense[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_through_shard_map(rng: np.random.Generator, mesh: Mesh, check_vma: bool) -> None:
    """Each device has other ids; gathering them gives the ids of all devices."""
    ids = rng.integers(0, 7, size=16).astype(np.int32)
    g = SparseRows(ids, np.float32(rng.normal(size=(16, 3))), 6)

    def local(g: SparseRows) -> tuple[SparseRows, SparseRows, jax.Array]:
        assert g.rows.shape == (2, 3)
        every = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), g)
        return g, every, jax.lax.psum(g.merged().to_dense(), "data")

    sharded = PartitionSpec("data")
    shard_map = partial(jax.shard_map, mesh=mesh, in_specs=sharded, check_vma=check_vma)
    same, every, total = jax.jit(shard_map(local, out_specs=(sharded, sharded, PartitionSpec())))(g)
    assert_same(same, g)
    # Every device has a copy.
    np.testing.assert_array_equal(every.ids.reshape(8, 16), np.tile(ids, (8, 1)))
    np.testing.assert_allclose(total, dense_by_numpy(g), rtol=1e-6, atol=1e-6)


def _update(tx: optax.GradientTransformation, as_params: bool, g: Any, table: Any) -> Any:
    return tx.update(g, tx.init(g if as_params else table), table)


def _psum(g: Any, _: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spec = PartitionSpec()
    return jax.shard_map(
        lambda g: jax.lax.psum(g, "data"), mesh=mesh, in_specs=spec, out_specs=spec
    )(g)


FOREIGN: dict[str, Callable[[Any, Any], Any]] = {
    "scale by an integer": partial(_update, optax.scale(2), False),
    "scale": partial(_update, optax.scale(0.5), False),
    "scale_by_schedule": partial(_update, optax.scale_by_schedule(lambda _: 2), False),
    "clip": partial(_update, optax.clip(1.0), False),
    "add_noise": partial(_update, optax.add_noise(0.1, 0.1, 0), False),
    "add_decayed_weights": partial(_update, optax.add_decayed_weights(0.1), False),
    "trace": partial(_update, optax.trace(0.9), False),
    "trace of rows": partial(_update, optax.trace(0.9), True),
    "adam": partial(_update, optax.adam(0.1), False),
    "adam of rows": partial(_update, optax.adam(0.1), True),
    "MultiSteps": partial(_update, optax.MultiSteps(lazy_adam(0.1), 2), False),
    "MultiSteps of rows": partial(_update, optax.MultiSteps(optax.identity(), 2), True),
    "apply_updates": lambda g, table: optax.apply_updates(table, g),
    "apply_updates of NumPy's": lambda g, _: optax.apply_updates({"t": np.ones((6, 3))}, g),
    "apply_updates to rows": lambda g, _: optax.apply_updates(g, g),
    "add": lambda g, _: jax.tree.map(jnp.add, g, g),
    "add on both sides": lambda g, table: jax.tree.map(
        lambda u, x: u + x, g, table, is_leaf=rows.is_sparse
    ),
    "integer product": lambda g, _: jax.tree.map(lambda x: 2 * x, g),
    "NumPy's product": lambda g, _: jax.tree.map(lambda x: np.float32(2) * x, g),
    "NumPy's array first": lambda g, _: np.ones((6, 3)) * g["t"],
    "asarray": lambda g, _: jnp.asarray(g["t"]),
    "sum of squares": lambda g, _: jax.tree.map(lambda x: jnp.sum(jnp.square(x)), g),
    "psum": _psum,
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_piece_raises(rng: np.random.Generator, name: str, jit: bool) -> None:
    foreign = jax.jit(FOREIGN[name]) if jit else FOREIGN[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        foreign({"t": rows_of(rng)}, {"t": jnp.ones((6, 3))})
    # An error about SparseRows, and not one of a mistake in this test.
    assert "SparseRows" in str(raised.value)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_foreign_global_norm_raises(rng: np.random.Generator, jit: bool) -> None:
    """Outside jit it is JAX's NotImplementedError, because random keys have no real part."""
    clip = partial(_update, optax.clip_by_global_norm(1.0), False)
    for norm in (clip, lambda g, _: optax.tree.norm(g)):
        with pytest.raises(TypeError if jit else NotImplementedError):
            (jax.jit(norm) if jit else norm)({"t": rows_of(rng)}, {"t": jnp.ones((6, 3))})


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_foreign_zeros_are_padding(rng: np.random.Generator, jit: bool) -> None:
    """They are not row 0, whose moments would decay."""
    g = rows_of(rng)
    zeros: Callable[[SparseRows], SparseRows] = partial(jax.tree.map, jnp.zeros_like)
    nothing = (jax.jit(zeros) if jit else zeros)(g)
    np.testing.assert_array_equal(nothing.ids, [6] * 5)
    np.testing.assert_array_equal(nothing.to_dense(), np.zeros((6, 3)))


def test_wrapped_in_apply_if_finite(rng: np.random.Generator) -> None:
    """It works, because `apply_if_finite` only selects between leaves."""
    params = {"t": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)}
    tx, plain = optax.apply_if_finite(lazy_adam(0.1), 3), lazy_adam(0.1)
    g = {"t": rows_of(rng)}
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(g, plain.init(params), params)
    assert_same(updates["t"], expected["t"])
    broken = {"t": g["t"].with_rows(g["t"].rows.at[0, 0].set(jnp.nan))}
    updates, after = jax.jit(tx.update)(broken, state, params)
    moved = optim_zoo.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["t"], params["t"])
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
