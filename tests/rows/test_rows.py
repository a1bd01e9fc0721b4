"""SparseRows, what foreign pieces do with them, our own pieces, and the gradients of rows."""

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
from optim_zoo import SparseRows, lazy_adam, registry, rows

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NUM_ROWS = 6
IDS = np.array([4, 1, 6, 1, 0], np.int32)  # 1 twice, padding in the middle
Loss = Callable[..., Any]


def _rows_of(
    rng: np.random.Generator, shape: tuple[int, ...] = (3,), dtype: Any = np.float32
) -> SparseRows:
    return SparseRows(IDS, jnp.asarray(rng.normal(size=(len(IDS), *shape)), dtype), NUM_ROWS)


def _dense(g: SparseRows) -> np.ndarray:
    """What `g` means, in float64 and by NumPy alone."""
    whole = np.zeros(g.shape)
    known = np.asarray(g.ids) < g.num_rows
    np.add.at(whole, np.asarray(g.ids)[known], np.asarray(g.rows, np.float64)[known])
    return whole


def _assert_same(actual: SparseRows, expected: SparseRows) -> None:
    assert actual.num_rows == expected.num_rows
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.rows, expected.rows)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


# --- SparseRows ---


def test_attributes(rng: np.random.Generator) -> None:
    g = _rows_of(rng, (3, 2))
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
    """Also those that are narrower than num_rows."""
    g = SparseRows(np.asarray([3, 100], dtype), np.ones((2, 2), np.float32), 100_000)
    np.testing.assert_array_equal(g.ids, [3, 100])
    assert g.ids.dtype == jnp.int32


def test_ids_at_the_far_end() -> None:
    last = 2**31 - 2
    g = SparseRows(np.asarray([0, last, last + 1]), np.ones(3, np.float32), last + 1)
    np.testing.assert_array_equal(g.ids, [0, last, last + 1])


def test_traced_ids_out_of_range_are_padding() -> None:
    """Nothing wraps around: neither -1 to the last row nor 2**32 to the first."""

    @jax.jit
    def dense(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        g = SparseRows(ids, jnp.ones(len(ids)), 6)
        return g.ids, g.to_dense()

    low, high = -(2**31), 2**31 - 1
    ids, whole = dense(jnp.asarray([-1, 7, low, high, 2, 6], jnp.int32))
    np.testing.assert_array_equal(ids, [6, 6, 6, 6, 2, 6])
    np.testing.assert_array_equal(whole, [0, 0, 1, 0, 0, 0])
    ids, _ = dense(jnp.asarray([2**32 - 1, 5], jnp.uint32))
    np.testing.assert_array_equal(ids, [6, 5])
    narrow = jax.jit(lambda ids: SparseRows(ids, jnp.ones(2), 1000).ids)
    np.testing.assert_array_equal(narrow(jnp.asarray([-1, 100], jnp.int8)), [1000, 100])
    with jax.enable_x64(True):
        ids, _ = dense(jnp.asarray([2**32, 5, -(2**33) + 1], jnp.int64))
    np.testing.assert_array_equal(ids, [6, 5, 6])


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_to_dense(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    g = _rows_of(rng, shape)
    # Two float32 rows added: half an ulp of what is near 1.
    np.testing.assert_allclose(g.to_dense(), _dense(g), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_merged(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    g = _rows_of(rng, shape)
    for merged in (g.merged(), jax.jit(SparseRows.merged)(g)):
        np.testing.assert_array_equal(merged.ids, [0, 1, 4, 6, 6])
        np.testing.assert_array_equal(merged.rows[3:], np.zeros((2, *shape)))
        np.testing.assert_allclose(_dense(merged), _dense(g), rtol=1e-6, atol=1e-7)
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
    np.testing.assert_allclose(_dense(merged), _dense(g), rtol=1e-6, atol=1e-7)


def test_many_ids_merge_as_numpy_has_them(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 1001, size=3000)
    g = SparseRows(ids, np.float32(rng.normal(size=(3000, 2))), 1000)
    merged = jax.jit(SparseRows.merged)(g)
    unique = np.unique(ids[ids < 1000])
    np.testing.assert_array_equal(merged.ids[: len(unique)], unique)
    np.testing.assert_array_equal(merged.ids[len(unique) :], 1000)
    # A dozen float32 rows of size 1 are added.
    np.testing.assert_allclose(_dense(merged), _dense(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 256])
def test_low_precision_rows_are_added_in_float32(n: int) -> None:
    """256 + 1 is 256 in bfloat16."""
    values = jnp.asarray([256.0] + [1.0] * (n - 1) if n else [], jnp.bfloat16)
    merged = SparseRows(np.zeros(n, np.int32), values, 3).merged()
    assert merged.dtype == jnp.float32
    assert float(merged.to_dense()[0]) == (256 + n - 1 if n else 0)


def test_other_rows_under_the_same_ids(rng: np.random.Generator) -> None:
    g = _rows_of(rng)
    other = g.with_rows(2 * g.rows)
    _assert_same(other, SparseRows(IDS, 2 * np.asarray(g.rows), NUM_ROWS))


# --- as a tree ---


def test_a_tree_of_rows_and_opaque_ids(rng: np.random.Generator) -> None:
    g = _rows_of(rng)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path({"t": g})]
    assert paths == ["['t'].rows", "['t'].ids"]
    _assert_same(jax.tree.map(lambda x: x, g), g)
    again = jax.tree.unflatten(jax.tree.structure(g), jax.tree.leaves(g))
    _assert_same(again, g)
    other = SparseRows(IDS, g.rows, 7)
    assert jax.tree.structure(g) != jax.tree.structure(other)


def test_through_jit_donation_and_eval_shape(rng: np.random.Generator) -> None:
    g = _rows_of(rng)
    shapes = jax.eval_shape(lambda g: g, g)
    assert isinstance(shapes, SparseRows)
    assert (shapes.shape, shapes.dtype, shapes.num_rows) == (g.shape, g.dtype, g.num_rows)
    expected = SparseRows(np.asarray(g.ids), np.asarray(g.rows), NUM_ROWS)
    moved = jax.jit(lambda g: g.with_rows(g.rows + 0), donate_argnums=0)(g)
    assert g.rows.is_deleted()
    _assert_same(moved, expected)


def test_through_scan_and_cond(rng: np.random.Generator) -> None:
    g = _rows_of(rng)

    def double(g: SparseRows, _: None) -> tuple[SparseRows, SparseRows]:
        return g.with_rows(2 * g.rows), g

    last, seen = jax.lax.scan(double, g, None, length=3)
    _assert_same(last, g.with_rows(8 * g.rows))
    for i in range(3):
        _assert_same(jax.tree.map(lambda x, i=i: x[i], seen), g.with_rows(2**i * g.rows))
    _assert_same(jax.lax.cond(True, lambda g: g, lambda g: double(g, None)[0], g), g)


def test_through_vmap(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 7, size=(4, 5))
    values = np.float32(rng.normal(size=(4, 5, 3)))

    def both(ids: jax.Array, values: jax.Array) -> tuple[SparseRows, jax.Array]:
        g = SparseRows(ids, values, 6)
        return g, g.merged().to_dense()

    many, dense = jax.vmap(both)(jnp.asarray(ids), values)
    np.testing.assert_array_equal(many.ids, ids)
    for i in range(4):
        expected = _dense(SparseRows(ids[i], values[i], 6))
        np.testing.assert_allclose(dense[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_through_shard_map(rng: np.random.Generator, mesh: Mesh, check_vma: bool) -> None:
    """Each device has its own ids; gathered, they are the ids of all."""
    ids = rng.integers(0, 7, size=16).astype(np.int32)
    g = SparseRows(ids, np.float32(rng.normal(size=(16, 3))), 6)

    def local(g: SparseRows) -> tuple[SparseRows, SparseRows, jax.Array]:
        assert g.rows.shape == (2, 3)
        every = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), g)
        return g, every, jax.lax.psum(g.merged().to_dense(), "data")

    spread = PartitionSpec("data")
    shard_map = partial(jax.shard_map, mesh=mesh, in_specs=spread, check_vma=check_vma)
    same, every, total = jax.jit(shard_map(local, out_specs=(spread, spread, PartitionSpec())))(g)
    _assert_same(same, g)
    # One copy a device.
    np.testing.assert_array_equal(every.ids.reshape(8, 16), np.tile(ids, (8, 1)))
    np.testing.assert_allclose(total, _dense(g), rtol=1e-6, atol=1e-6)


# --- foreign pieces: what they would change raises ---


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
        foreign({"t": _rows_of(rng)}, {"t": jnp.ones((6, 3))})
    # Ours, or JAX's about the tree or the opaque ids: not something this test got wrong.
    assert "SparseRows" in str(raised.value)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_foreign_global_norm_raises(rng: np.random.Generator, jit: bool) -> None:
    """Outside jit it is JAX's own NotImplementedError, as random keys have no real part."""
    clip = partial(_update, optax.clip_by_global_norm(1.0), False)
    for norm in (clip, lambda g, _: optax.tree.norm(g)):
        with pytest.raises(TypeError if jit else NotImplementedError):
            (jax.jit(norm) if jit else norm)({"t": _rows_of(rng)}, {"t": jnp.ones((6, 3))})


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_foreign_zeros_are_padding(rng: np.random.Generator, jit: bool) -> None:
    """Not row 0, whose moments would decay."""
    g = _rows_of(rng)
    zeros: Callable[[SparseRows], SparseRows] = partial(jax.tree.map, jnp.zeros_like)
    nothing = (jax.jit(zeros) if jit else zeros)(g)
    np.testing.assert_array_equal(nothing.ids, [6] * 5)
    np.testing.assert_array_equal(nothing.to_dense(), np.zeros((6, 3)))


def test_wrapped_in_apply_if_finite(rng: np.random.Generator) -> None:
    """It only chooses between whole leaves, so it works."""
    params = {"t": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)}
    tx, plain = optax.apply_if_finite(lazy_adam(0.1), 3), lazy_adam(0.1)
    g = {"t": _rows_of(rng)}
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(g, plain.init(params), params)
    _assert_same(updates["t"], expected["t"])
    broken = {"t": g["t"].with_rows(g["t"].rows.at[0, 0].set(jnp.nan))}
    updates, after = jax.jit(tx.update)(broken, state, params)
    moved = optim_zoo.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["t"], params["t"])
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


# --- our own pieces ---


def test_learning_rate(rng: np.random.Generator) -> None:
    g = _rows_of(rng)
    tx = optim_zoo.scale_by_learning_rate(0.5)
    params = {"t": jnp.ones((6, 3), jnp.bfloat16)}
    for given, dtype in ((None, jnp.float32), (params, jnp.bfloat16)):
        updates, _ = tx.update({"t": g}, tx.init(params), given)
        _assert_same(updates["t"], g.with_rows((-0.5 * g.rows).astype(dtype)))


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_that_of_the_dense_gradient(rng: np.random.Generator, max_norm: float) -> None:
    """Rows of the same id are one row of the norm, and padding is none."""
    g = _rows_of(rng)
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
    apart = np.sqrt(np.sum(np.square(g.rows)) + np.sum(np.square(other)))
    assert abs(norm / apart - 1) > 0.01  # here the two norms differ


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
    """The rows that have a gradient move as in Adam's first steps, the others not at all."""
    params = _table_and_bias(rng)
    g = {"bias": 0.1 * jnp.ones(3), "t": _rows_of(rng).with_rows(0.01 * jnp.ones((5, 3)))}
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
    gradient = _rows_of(rng)
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


# --- apply_updates ---


def test_dense_leaves_rows_and_none(rng: np.random.Generator) -> None:
    table = rng.normal(size=(6, 3)).astype(np.float32)
    params = {"t": jnp.asarray(table), "none": None, "w": jnp.ones(2, jnp.bfloat16), "n": table}
    g = _rows_of(rng)
    updates = {"t": g, "none": None, "w": jnp.asarray([1.0, 2.0**-9]), "n": g}
    for add in (optim_zoo.apply_updates, jax.jit(optim_zoo.apply_updates)):
        moved = add(params, updates)
        assert moved["none"] is None
        assert moved["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(moved["w"], jnp.asarray([2, 1], jnp.bfloat16))
        for name in ("t", "n"):
            np.testing.assert_allclose(moved[name], table + _dense(g), rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(moved[name][2:4], table[2:4])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_tables_are_rounded_once(dtype: Any) -> None:
    """1 + 3 x 2^-9: one such row alone is lost in bfloat16, three together are not."""
    table = {"t": jnp.ones((2, 1), jnp.bfloat16)}
    few = np.full((4, 1), 2.0**-9)
    updates = {"t": SparseRows(np.asarray([0, 0, 0, 1]), jnp.asarray(few, dtype), 2)}
    moved = jax.jit(optim_zoo.apply_updates)(table, updates)["t"]
    assert moved.dtype == jnp.bfloat16
    expected = optim_zoo.apply_updates(table, {"t": jnp.asarray([[3 * 2.0**-9], [2.0**-9]])})["t"]
    np.testing.assert_array_equal(moved, expected)
    assert float(moved[0, 0]) > 1
    assert float(moved[1, 0]) == 1


def test_wider_rows_than_the_table_and_the_other_way(rng: np.random.Generator) -> None:
    values = rng.normal(size=(5, 3))
    with jax.enable_x64(True):
        for wide, narrow in ((jnp.float64, jnp.float32), (jnp.float32, jnp.float64)):
            table = jnp.zeros((6, 3), wide)
            g = SparseRows(IDS, jnp.asarray(values, narrow), 6)
            moved = optim_zoo.apply_updates(table, g)
            assert moved.dtype == wide
            np.testing.assert_allclose(moved, _dense(g), rtol=1e-6, atol=1e-7)


def test_a_donated_table_stays_in_place() -> None:
    """And no temporary grows with the table."""
    tx = lazy_adam(0.1)

    def step(params: Any, state: Any, g: SparseRows) -> Any:
        updates, state = tx.update({"t": g}, state, params)
        return optim_zoo.apply_updates(params, updates), state

    temporaries = []
    for num_rows in (1_000, 100_000):
        params = {"t": jnp.zeros((num_rows, 8))}
        state = tx.init(params)
        g = SparseRows(np.arange(0, 640, 5) % 100, np.ones((128, 8), np.float32), num_rows)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, g).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.ndim}
        params, state = compiled(params, state, g)
        after = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.ndim}
        assert len(before) == 3
        assert before == after
    assert temporaries[0] == temporaries[1]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (lambda: {"a": {"t": SparseRows([1], np.ones((1, 3)), 7)}}, r"a/t.*\(7, 3\).*\(6, 3\)"),
        (lambda: {"a": {"t": SparseRows([1], np.ones((1, 2)), 6)}}, r"a/t.*\(6, 2\).*\(6, 3\)"),
        (lambda: {"a": {"t": SparseRows([1], np.ones(1), 6)}}, r"a/t.*\(6,\).*\(6, 3\)"),
        (lambda: {"a": {"t": jnp.ones((5, 3))}}, r"a/t.*\(5, 3\).*\(6, 3\)"),
        (lambda: {"a": {"t": None}}, "differ at a/t"),
        (lambda: {"a": {"u": jnp.ones((6, 3))}}, "differ at a/t, a/u"),
    ],
)
def test_updates_that_do_not_fit(updates: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"apply_updates.*{message}"):
        optim_zoo.apply_updates({"a": {"t": jnp.ones((6, 3))}}, updates())


# --- value_and_grad ---


def _params(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "embed": {"word": jnp.asarray(rng.normal(size=(10, 4)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=10), jnp.float32),
        "blocks": jnp.asarray(rng.normal(size=(10, 2, 4)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
        "none": None,
    }


TABLES = ["^embed/word$", "^bias$", "^blocks$"]


def _loss(params: Any, ids: jax.Array, *, power: float = 1.5) -> Any:
    """Ids of rank 2, 1 and 0, and a second read of a table by other ids."""
    word, bias, blocks = params["embed"]["word"], params["bias"], params["blocks"]
    x = jnp.tanh(word[ids] @ params["kernel"])
    x = x * word[ids[:, 0]][:, None] + blocks[ids].sum(-2) + word[jnp.asarray(3)][None, None]
    return jnp.mean(jnp.abs(x) ** power) + jnp.sum(bias[ids] ** 2) + bias[np.int32(2)]


def _assert_dense_gradient(grads: Any, expected: Any) -> None:
    assert jax.tree.structure(grads, is_leaf=rows.is_sparse) == jax.tree.structure(expected)
    dense = jax.tree.map(
        lambda g: g.to_dense() if rows.is_sparse(g) else g, grads, is_leaf=rows.is_sparse
    )
    # float32, added in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), dense, expected)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_gradient_is_the_dense_one(rng: np.random.Generator, jit: bool) -> None:
    params, ids = _params(rng), jnp.asarray([[1, 2, 3], [2, 2, 9]])
    ours: Any = rows.value_and_grad(_loss, TABLES)
    theirs: Any = jax.value_and_grad(_loss)
    for kwargs in ({}, {"power": 2.0}):
        value, grads = (jax.jit(ours) if jit else ours)(params, ids, **kwargs)
        expected_value, expected = theirs(params, ids, **kwargs)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        assert [rows.is_sparse(grads[k]) for k in ("bias", "blocks", "kernel")] == [1, 1, 0]
        _assert_dense_gradient(grads, expected)
        # Reads in order: six ids, two, one.
        np.testing.assert_array_equal(grads["embed"]["word"].ids, [1, 2, 3, 2, 2, 9, 1, 2, 3])


def test_some_tables_only(rng: np.random.Generator) -> None:
    """A leaf that no pattern names is an array in the loss, and has a dense gradient."""
    params, ids = _params(rng), jnp.asarray([[1, 2]])
    _, grads = rows.value_and_grad(_loss, ["word"])(params, ids)
    assert isinstance(grads["bias"], jax.Array)
    _assert_dense_gradient(grads, jax.grad(_loss)(params, ids))


def test_has_aux(rng: np.random.Generator) -> None:
    params, ids = _params(rng), jnp.asarray([[1, 2]])

    def loss(params: Any, ids: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return _loss(params, ids), {"rows": params["embed"]["word"][ids], "n": ids.size}

    (value, aux), grads = rows.value_and_grad(loss, TABLES, has_aux=True)(params, ids)
    (expected_value, expected_aux), expected = jax.value_and_grad(loss, has_aux=True)(params, ids)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_array_equal(aux["rows"], expected_aux["rows"])
    assert aux["n"] == 2
    _assert_dense_gradient(grads, expected)


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
    """The shape of every array that is made in a jaxpr, those inside its parts included."""
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
    """Neither forwards nor backwards. The same look finds those of the dense gradient."""
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
    """As through jax.value_and_grad: here of the loss it returns."""
    params, ids = _params(rng), jnp.asarray([[1, 2]])
    actual = jax.grad(lambda p: rows.value_and_grad(_loss, TABLES)(p, ids)[0])(params)
    expected = jax.grad(_loss)(params, ids)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_gradient_for_each_example(rng: np.random.Generator) -> None:
    params, ids = _params(rng), jnp.asarray(rng.integers(0, 10, size=(5, 1, 3)))
    with_grad = rows.value_and_grad(_loss, TABLES)
    _, grads = jax.jit(jax.vmap(with_grad, in_axes=(None, 0)))(params, ids)
    expected = jax.jit(jax.vmap(jax.grad(_loss), in_axes=(None, 0)))(params, ids)
    for i in range(5):
        mine, its = jax.tree.map(lambda x, i=i: x[i], (grads, expected))
        _assert_dense_gradient(mine, its)


def test_numpy_parameters(rng: np.random.Generator) -> None:
    params, ids = _params(rng), np.asarray([[1, 2]])
    _, grads = rows.value_and_grad(_loss, TABLES)(jax.tree.map(np.asarray, params), ids)
    _assert_dense_gradient(grads, jax.grad(_loss)(params, jnp.asarray(ids)))


# --- on several devices ---


def _train(
    params: Any, batches: jax.Array, place: Callable[[jax.Array], jax.Array]
) -> tuple[Any, jax.Array]:
    tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), lazy_adam(0.1))
    with_grad = rows.value_and_grad(_loss, TABLES)

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
def test_spread_over_devices_under_jit(rng: np.random.Generator, mesh: Mesh, what: str) -> None:
    """Tables cut over their rows, batches over theirs: the numbers of one device."""
    spread = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = _params(rng)
    wide = rng.normal(size=(16, 4))
    params["embed"]["word"] = jnp.asarray(wide, jnp.float32)  # 16 rows: two a device
    batches = jnp.asarray(rng.integers(0, 10, size=(3, 8, 3)))
    expected, expected_losses = _train(params, batches, lambda ids: ids)
    cut = jax.device_put(params, everywhere)
    if what != "batch":
        cut["embed"]["word"] = jax.device_put(params["embed"]["word"], spread)
    batch_sharding = everywhere if what == "table" else spread
    actual, losses = _train(cut, batches, lambda ids: jax.device_put(ids, batch_sharding))
    # Sums over 8 devices come in another order; three steps of Adam in float32.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses, expected_losses)
    jax.tree.map(close, actual, expected)


# Without types JAX counts a sum over devices once a device, for any leaf: no case.
@pytest.mark.parametrize(("check_vma", "summed"), [(True, False), (True, True), (False, False)])
def test_under_shard_map_rows_are_the_devices_own(
    rng: np.random.Generator, mesh: Mesh, check_vma: bool, summed: bool
) -> None:
    """Gathered they are the gradient of the losses' sum, once.

    One read has the same id on all devices; "position" has no other.
    """
    params = {**_params(rng), "position": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    ids = jnp.asarray(rng.integers(0, 10, size=(16, 3)))

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        position = params["position"][jnp.arange(3)]
        return _loss(params, ids) + jnp.mean(params["bias"][ids] * position[None, :, 0])

    def local(params: Any, ids: jax.Array) -> Any:
        def mine(params: Any, ids: jax.Array) -> jax.Array:
            value = loss(params, ids)
            return jax.lax.psum(value, "data") if summed else value

        _, grads = rows.value_and_grad(mine, [*TABLES, "position"])(params, ids)
        every = {k: g for k, g in grads.items() if k not in ("kernel", "none")}
        gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), every)
        return jax.tree.map(lambda x: x[None], gathered)

    shard_map = partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    spread = PartitionSpec("data")
    every = jax.jit(shard_map(local, in_specs=(PartitionSpec(), spread), out_specs=spread))(
        params, ids
    )
    total = jax.grad(lambda p: sum(loss(p, ids[i : i + 2]) for i in range(0, 16, 2)))(params)
    expected = {k: total[k] for k in every}
    for device in (0, 7):
        _assert_dense_gradient(jax.tree.map(lambda x, i=device: x[i], every), expected)


def test_under_shard_map_where_only_the_loss_varies(rng: np.random.Generator, mesh: Mesh) -> None:
    """A table of positions: no device has other ids, each another gradient."""
    table = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def loss(table: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(table[jnp.arange(3)] @ x.T))

    def local(table: jax.Array, x: jax.Array) -> jax.Array:
        _, g = rows.value_and_grad(loss, [""])(table, x)
        return jax.lax.psum(g.to_dense(), "data")

    whole, spread = PartitionSpec(), PartitionSpec("data")
    total = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(whole, spread), out_specs=whole))
    expected = jax.grad(loss)(table, x)
    np.testing.assert_allclose(total(table, x), expected, rtol=1e-5, atol=1e-6)
