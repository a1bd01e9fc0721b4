from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optim_zoo import SparseRows, lamb, layerwise_decay, scale_by_rules, split, stacked
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError

PARAMS = {
    "embed": jnp.ones((4, 2)),
    "stack": {"kernel": jnp.ones((3, 2, 5)), "bias": jnp.ones((3, 5))},
    "turned": jnp.ones((2, 3)),
    "head": jnp.ones(3),
}


def _scaled(factors: Any, updates: Any = PARAMS, params: Any = PARAMS) -> Any:
    tx = scale_by_rules(factors)
    scaled, state = tx.update(updates, tx.init(params), params)
    assert jax.tree.leaves(state) == []
    return scaled


def test_each_leaf_is_scaled_by_the_first_rule_that_matches(rng: np.random.Generator) -> None:
    updates = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), PARAMS)
    vector = np.array([0.25, 0.5, 3.0])
    factors = [
        ("stack/bias", 0.1),
        ("stack", vector),
        ("turned", ([0.5, 1, 0], stacked(-1))),
        ("e", 2),
    ]
    scaled = _scaled(factors, updates)
    expected = {
        "embed": 2 * np.float64(updates["embed"]),
        "stack": {
            "kernel": vector[:, None, None] * np.float64(updates["stack"]["kernel"]),
            "bias": 0.1 * np.float64(updates["stack"]["bias"]),
        },
        "turned": np.array([0.5, 1, 0]) * np.float64(updates["turned"]),
        "head": 2 * np.float64(updates["head"]),
    }
    # A product in float32 has a relative error of at most 2^-24, and so has 0.1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 2**-23), scaled, expected)
    jax.tree.map(np.testing.assert_array_equal, _scaled([], updates), updates)


@pytest.mark.parametrize("factor", [0, 0.0, np.float32(0), jnp.zeros(()), np.zeros(4), [0] * 4])
def test_a_factor_of_0_freezes_a_leaf_whatever_its_gradient_is(factor: Any) -> None:
    params = {"embed": jnp.asarray([-0.0, 0.0, 1.0, 2.0])}
    updates = {"embed": jnp.asarray([1.0, jnp.nan, jnp.inf, -1.0])}
    after = optax.apply_updates(params, _scaled([("embed", factor)], updates, params))
    np.testing.assert_array_equal(after["embed"], params["embed"])
    assert np.signbit(after["embed"]).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_keep_their_dtype_and_are_scaled_in_float32(dtype: str) -> None:
    """0.7 is not a number of these dtypes: it must not be rounded before it is multiplied."""
    updates = {"stack": jnp.arange(1.0, 513.0).astype(dtype).reshape(2, 256)}
    exact = np.float32(updates["stack"]) * np.float32(0.7)
    for factor in (0.7, [0.7, 0.7]):
        scaled = _scaled([("stack", factor)], updates, updates)["stack"]
        assert scaled.dtype == dtype
        np.testing.assert_array_equal(scaled, jnp.asarray(exact, dtype))


@pytest.mark.parametrize(
    "factor", [0.5, 0.0, np.arange(6.0), (np.asarray([0.5, 2.0]), stacked(1))], ids=str
)
def test_sparse_rows_are_scaled_like_the_dense_gradient(factor: Any) -> None:
    sparse = SparseRows([4, 1, 1, 6], jnp.arange(8.0).reshape(4, 2), 6)  # one row of padding
    params = {"table": jnp.ones((6, 2))}
    scaled = _scaled([("table", factor)], {"table": sparse}, params)["table"]
    dense = _scaled([("table", factor)], {"table": sparse.to_dense()}, params)["table"]
    np.testing.assert_array_equal(scaled.to_dense(), dense)


def test_traced_factors_pass() -> None:
    def scaled(number: jax.Array, vector: jax.Array) -> Any:
        return _scaled([("head", number), ("bias", vector), ("kernel", [number, 1.0, number])])

    made = jax.jit(scaled)(0.5, jnp.asarray([0.0, 1.0, 2.0]))
    assert made["head"].tolist() == [0.5] * 3
    assert made["stack"]["bias"][:, 0].tolist() == [0, 1, 2]
    assert made["stack"]["kernel"][:, 0, 0].tolist() == [0.5, 1, 0.5]
    with pytest.raises(ArgumentValueError, match="kernel has 3 layers"):
        jax.jit(lambda vector: _scaled([("kernel", vector)]))(jnp.ones(2))


def test_parts_of_a_tree_and_injected_hyperparameters() -> None:
    factors = [("head", 0.5), ("stack", [1.0, 2.0, 3.0])]
    # Under `optax.masked` a pattern may match a leaf that another part of the tree has.
    mask = {"embed": True, "stack": True, "turned": True, "head": False}
    for tx in (
        optax.masked(scale_by_rules(factors), mask),
        optax.inject_hyperparams(scale_by_rules)(factors),
        optax.inject_hyperparams(lambda scale: scale_by_rules([("stack", scale), ("head", 0.5)]))(
            np.asarray([1.0, 2.0, 3.0])
        ),
    ):
        scaled, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        assert scaled["stack"]["bias"][:, 0].tolist() == [1, 2, 3]
        assert scaled["embed"].tolist() == PARAMS["embed"].tolist()


def test_layers_that_are_distributed_over_a_mesh_axis_keep_their_factors() -> None:
    """The vector has the factors of the layers of all devices, and each device takes its own."""
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("pipe",))
    params = {"stack": jnp.ones((8, 3)), "head": jnp.ones(3)}
    specs = {"stack": P("pipe"), "head": P()}
    vector = np.arange(8.0)

    def scaled(factor: Any) -> Any:
        return lambda updates: _scaled([("stack", factor)], updates, updates)

    for check_vma in (True, False):
        mapped = jax.shard_map(
            scaled((vector, stacked(0, mesh_axis="pipe"))),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=specs,
            check_vma=check_vma,
        )
        np.testing.assert_array_equal(jax.jit(mapped)(params)["stack"][:, 0], vector)
    wrong = jax.shard_map(scaled(vector), mesh=mesh, in_specs=(specs,), out_specs=specs)
    with pytest.raises(ArgumentValueError, match="stack has 2 layers along axis 0"):
        jax.jit(wrong)(params)
    # Outside the mapped function, a device holds all layers.
    whole = scaled((vector, stacked(0, mesh_axis="pipe")))(params)
    np.testing.assert_array_equal(whole["stack"][:, 0], vector)


def test_steps_behind_an_optimizer_are_shorter_by_the_decay() -> None:
    layers = [("stack/", stacked(0))]
    factors = layerwise_decay(PARAMS, 0.5, layers=layers)
    tx = optax.chain(lamb(0.1, layers=layers), scale_by_rules(factors))
    plain = lamb(0.1, layers=layers)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    scaled, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    full, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    ratio = jax.tree.map(lambda x, y: np.unique(x / y).tolist(), scaled, full)
    assert ratio["embed"] == [0.0625]
    assert ratio["stack"]["kernel"] == ratio["stack"]["bias"] == [0.125, 0.25, 0.5]
    assert ratio["turned"] == ratio["head"] == [1.0]


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ("embed", ArgumentTypeError, r"^factors must be a list of pairs"),
        ([("embed",)], ArgumentTypeError, r"^factors must be a list of pairs"),
        ([("(", 1)], ArgumentValueError, r"^factors: '\(' is not a regular expression"),
        ([("embed", -1)], ArgumentValueError, r"factor of 'embed' must be in \[0, inf\), got -1"),
        ([("embed", np.inf)], ArgumentValueError, r"must be in \[0, inf\), got inf"),
        ([("embed", [1, np.nan, 1])], ArgumentValueError, r"must be in \[0, inf\), got nan"),
        ([("embed", jnp.asarray([1.0, -2.0]))], ArgumentValueError, r"\), got -2"),
        ([("embed", np.ones((2, 2)))], ArgumentValueError, "must be a number or a vector, got"),
        ([("embed", [[1.0]])], ArgumentTypeError, "must be a number or a vector, got"),
        ([("embed", "1")], ArgumentTypeError, "must be a number in .* got '1'"),
        ([("embed", None)], ArgumentTypeError, "must be a number in .* got None"),
        ([("embed", True)], ArgumentTypeError, "must be a number in .* got True"),
        ([("embed", (1.0, stacked(0)))], ArgumentTypeError, r"a pair \(vector, stacked\(axis\)\)"),
        ([("embed", ([1.0], split(0, 2)))], ArgumentTypeError, r"a pair \(vector, stacked"),
        ([("embed", (stacked(0),))], ArgumentTypeError, r"a pair \(vector, stacked\(axis\)\)"),
    ],
    ids=str,
)
def test_a_wrong_factor_raises_in_the_constructor(
    factors: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scale_by_rules(factors)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([("embde", 1)], r"^factors: 'embde' matches no leaf; the nearest paths are embed"),
        ([("stack", [1, 2])], "stack/bias has 3 layers along axis 0, its vector has 2 factors"),
        ([("a|e|h", [1, 2, 3])], "embed has 4 layers .* put a rule with a number for this leaf"),
        ([("head", ([1, 2, 3], stacked(1)))], r"head has shape \(3,\) and no axis 1 for a vector"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_the_parameters_raise_in_init(factors: Any, message: str) -> None:
    tx = scale_by_rules(factors)
    for params in (PARAMS, jax.eval_shape(lambda: PARAMS)):
        with pytest.raises(ArgumentValueError, match=message):
            tx.init(params)
