"""`apply_updates`: dense updates, rows, and leaves that are not trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import SparseRows, adamw, guards, lamb, lazy_adam, metrics
from tests.rows.problem import IDS, dense_by_numpy, rows_of

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {
    "number": 1.5,
    "kernel": jnp.ones((2, 3)),
    "none": None,
    "integers": jnp.arange(3),
    "booleans": np.array([True, False]),
    "integer": 7,
    "key": jax.random.key(0),
}
TRAINED = jax.tree.map(lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating), PARAMS)
Transformation = optax.GradientTransformation
PARTS: dict[str, Callable[[Transformation, Any], Transformation]] = {
    "masked": optax.masked,
    "partition": lambda tx, mask: optax.partition({True: tx, False: optax.set_to_zero()}, mask),
}


def _loss(params: Any) -> jax.Array:
    return 2 * jnp.sum(params["kernel"]) + 3 * params["number"]


def _without_key(tree: Any) -> Any:
    return {name: x for name, x in tree.items() if name != "key"}


def _assert_only_floating_leaves_move(moved: Any, params: Any) -> None:
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for name, x in params.items():
        if name in ("number", "kernel"):
            assert np.all(np.asarray(moved[name]) < np.asarray(x))
            assert jnp.result_type(moved[name]) == jnp.float32
        elif name == "key":
            assert moved[name] is x
        elif x is not None:
            np.testing.assert_array_equal(moved[name], x)
            assert jnp.result_type(moved[name]) == jnp.result_type(x)


@pytest.mark.parametrize("zeros", [False, True], ids=["float0", "zeros"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_leaves_that_are_left_out_of_the_optimizer_stay(part: Any, zeros: bool) -> None:
    """`zeros`: the gradient of integers as some users make it, in their own dtype."""
    params, trained = PARAMS, TRAINED
    gradients = jax.grad(_loss, allow_int=True)(params)
    assert gradients["integers"].dtype == jax.dtypes.float0
    if zeros:
        params, trained, gradients = map(_without_key, (params, trained, gradients))
        gradients = jax.tree.map(
            lambda trained, g, x: g if trained else jnp.zeros_like(x), trained, gradients, params
        )
    tx = part(adamw(0.1), trained)
    updates, _ = tx.update(gradients, tx.init(params), params)
    _assert_only_floating_leaves_move(optim_zoo.apply_updates(params, updates), params)


@pytest.mark.parametrize("wrap", [metrics.with_metrics, guards.skip_spikes])
def test_wrappers_that_take_norms_of_all_leaves(wrap: Any) -> None:
    """The gradient of dtype float0 that integers have adds nothing to a norm."""
    params, trained = _without_key(PARAMS), _without_key(TRAINED)
    tx = wrap(optax.masked(lamb(0.1), trained))
    gradients = jax.grad(_loss, allow_int=True)(params)
    updates, state = tx.update(gradients, tx.init(params), params)
    _assert_only_floating_leaves_move(optim_zoo.apply_updates(params, updates), params)
    if wrap is metrics.with_metrics:
        expected = np.sqrt(6 * 2**2 + 3**2)
        np.testing.assert_allclose(metrics.read(state)["gradient_norm"], expected, rtol=1e-6)


def test_masked_nodes_and_none_stay() -> None:
    masked = optax.MaskedNode()
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": masked, "d": None}
    updates = {"a": jnp.ones(2), "b": masked, "c": masked, "d": None}
    moved = jax.jit(optim_zoo.apply_updates)(params, updates)
    np.testing.assert_array_equal(moved["a"], 2)
    np.testing.assert_array_equal(moved["b"], 1)
    assert moved["c"] == masked
    assert moved["d"] is None


def test_complex_leaves_under_split_real_and_imaginary() -> None:
    """Also next to a real leaf; the update of a complex leaf is complex."""
    params = {"z": jnp.asarray([3.0 + 4.0j, 1.0j]), "x": jnp.ones(2)}
    gradients = {"z": jnp.asarray([1.0 - 1.0j, 2.0 + 0.5j]), "x": jnp.ones(2)}
    tx = optax.contrib.split_real_and_imaginary(adamw(0.1, weight_decay=0.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optim_zoo.apply_updates(params, updates)
    assert moved["z"].dtype == jnp.complex64
    # Adam's first step has the size of the learning rate, separately in both parts.
    np.testing.assert_allclose(moved["z"], [2.9 + 4.1j, -0.1 + 0.9j], rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved["x"], 0.9, rtol=1e-6)


def test_a_complex_update_of_a_real_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="the parameter has dtype complex64"):
        optim_zoo.apply_updates(jnp.ones(2), jnp.ones(2) * 1j)


@pytest.mark.parametrize(
    ("params", "updates"),
    [
        ({"a": jnp.ones(2)}, {"a": {"b": jnp.ones(2)}}),
        ({"a": {"b": jnp.ones(2)}}, {"a": jnp.ones(2)}),
        ([jnp.ones(2)], (jnp.ones(2),)),
        ({"a": jnp.ones(2)}, {"a": None}),
    ],
    ids=["subtree", "leaf", "container", "None"],
)
def test_updates_of_another_structure_are_refused(params: Any, updates: Any) -> None:
    with pytest.raises(ValueError, match="apply_updates: updates must be a tree like the para"):
        optim_zoo.apply_updates(params, updates)


@pytest.mark.parametrize("x", [1.5, np.float32(1.5), np.float64(1.5), np.ones(3, np.float32)])
def test_numbers_and_numpy_arrays_become_arrays_of_their_dtype(x: Any) -> None:
    """As in ``optax.apply_updates``; a number is not weakly typed afterwards."""
    moved = optim_zoo.apply_updates(x, jnp.full(np.shape(x), 0.25, jnp.bfloat16))
    expected = optax.apply_updates(x, jnp.full(np.shape(x), 0.25, jnp.bfloat16))
    np.testing.assert_array_equal(moved, expected)
    assert moved.dtype == expected.dtype == jnp.float32
    assert not moved.weak_type


def test_dense_leaves_rows_and_none(rng: np.random.Generator) -> None:
    table = rng.normal(size=(6, 3)).astype(np.float32)
    params = {"t": jnp.asarray(table), "none": None, "w": jnp.ones(2, jnp.bfloat16), "n": table}
    g = rows_of(rng)
    updates = {"t": g, "none": None, "w": jnp.asarray([1.0, 2.0**-9]), "n": g}
    for add in (optim_zoo.apply_updates, jax.jit(optim_zoo.apply_updates)):
        moved = add(params, updates)
        assert moved["none"] is None
        assert moved["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(moved["w"], jnp.asarray([2, 1], jnp.bfloat16))
        for name in ("t", "n"):
            np.testing.assert_allclose(moved[name], table + dense_by_numpy(g), rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(moved[name][2:4], table[2:4])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_tables_are_rounded_once(dtype: Any) -> None:
    """In bfloat16, 1 + 2^-9 is 1, but 1 + 3 x 2^-9 is larger."""
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
            np.testing.assert_allclose(moved, dense_by_numpy(g), rtol=1e-6, atol=1e-7)


def test_a_donated_table_stays_in_place() -> None:
    """No temporary array grows with the table."""
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
