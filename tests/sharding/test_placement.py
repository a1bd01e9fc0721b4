from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import lamb, sharding
from optim_zoo.sharding import placement
from tests.sharding.problem import data_mesh, many_params

pytestmark = pytest.mark.newest


def _data_and_model() -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_state_is_made_where_it_belongs(rng: np.random.Generator) -> None:
    """With parameters sharded over one axis of two, and state sharded over the other as well."""
    mesh = _data_and_model()
    over_model = NamedSharding(mesh, P(None, "model"))
    params = many_params(rng)
    params["hidden"] = jax.device_put(params["hidden"], over_model)
    tx = lamb(0.1)
    plain = optax.tree.get(sharding.init(tx, params, mesh=mesh), "ScaleByAdamState")
    assert plain.mu["hidden"].sharding.spec == P(None, "model")
    assert plain.mu["out"].sharding.is_fully_replicated
    state = sharding.init(tx, params, mesh=mesh, zero1="data")
    sharded = optax.tree.get(state, "ScaleByAdamState")
    assert sharded.mu["hidden"].sharding.spec == P("data", "model")
    assert sharded.nu["out"].sharding.spec == P("data")
    assert sharded.count.sharding.is_fully_replicated
    expected = sharding.state_shardings(tx, params, mesh=mesh, zero1="data")
    assert jax.tree.map(lambda x: x.sharding, state) == expected
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(tx.init(params)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((8, 16), P(), P(None, "data")),  # the longest
        ((16, 8), P(), P("data")),  # without a trailing None, as the compiler writes it
        ((8, 8), P(), P("data")),  # the first of equal ones
        ((8, 15), P(), P("data")),  # the longest that 4 divides
        ((16, 8), P("model"), P("model", "data")),  # the longest that is not sharded yet
        ((16, 8), P(None, ("model",)), P("data", ("model",))),
        ((16, 8), P(("model", "data")), P(("model", "data"))),  # sharded over that axis already
        ((3, 5), P(), P()),
        ((0, 3), P(), P()),
        ((), P(), P()),
    ],
)
def test_zero1_shards_one_more_dimension(shape: tuple[int, ...], spec: P, expected: P) -> None:
    mesh = _data_and_model()
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    shardings = sharding.state_shardings(optax.trace(0.9), {"x": x}, mesh=mesh, zero1="data")
    assert shardings.trace["x"] == NamedSharding(mesh, expected)
    unsharded = sharding.unsharded_by_zero1({"x": x}, mesh=mesh, zero1="data")
    assert unsharded == (["x"] if expected == spec else [])


@pytest.mark.parametrize("masked", [False, True])
def test_state_of_masked_parameters(masked: bool) -> None:
    """A part of the state that holds nothing for a parameter has no sharding for it."""
    mesh = data_mesh(8)
    params = {"x": jnp.zeros((8, 2)), "y": jnp.zeros(8)}
    tx = optax.masked(optax.trace(0.9), {"x": True, "y": not masked})
    trace = sharding.state_shardings(tx, params, mesh=mesh, zero1="data").inner_state.trace
    assert trace["x"] == NamedSharding(mesh, P("data"))
    assert isinstance(trace["y"], optax.MaskedNode if masked else NamedSharding)


def test_shardings_of_a_step_follow_the_rules_and_not_the_arrays(rng: np.random.Generator) -> None:
    mesh = _data_and_model()
    params = many_params(rng)
    params["hidden"] = jax.device_put(params["hidden"], NamedSharding(mesh, P(None, "data")))
    of_params, of_state = placement.step_shardings(
        optax.trace(0.9),
        params,
        mesh=mesh,
        zero1="data",
        param_shardings=[("out", P("model"))],
    )
    specs = {name: one.spec for name, one in of_params.items()}
    assert specs == {"hidden": P(), "out": P("model"), "bias": P(), "odd": P(), "scale": P()}
    assert of_state.trace["hidden"].spec == P(None, "data")
    assert of_state.trace["out"].spec == P("model")  # 4 devices do not divide its 2 columns
    assert of_state.trace["bias"].spec == P("data")


@pytest.mark.parametrize("name", ["zero1", "batch_axis"])
def test_an_axis_that_the_mesh_does_not_have(name: str) -> None:
    message = rf"{name} must be one of \('data', 'model'\), got 'pipe'"
    with pytest.raises(ValueError, match=message):
        placement.check_axis(name, "pipe", _data_and_model())


def test_put_takes_one_sharding_or_a_tree_of_them(rng: np.random.Generator) -> None:
    mesh = data_mesh(8)
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tree = {"x": rng.normal(size=(8, 2)).astype(np.float32), "key": jax.random.key(0)}
    for one, expected in (
        (replicated, {"x": replicated, "key": replicated}),
        ({"x": rows, "key": replicated}, {"x": rows, "key": replicated}),
    ):
        placed = sharding.put(tree, one)
        assert jax.tree.map(lambda x: x.sharding, placed) == expected
        np.testing.assert_array_equal(placed["x"], tree["x"])
        assert placed["key"] == tree["key"]


def test_copies_share_no_memory(rng: np.random.Generator) -> None:
    """Deleting the copies, as donation does, leaves the arrays that they were made of."""
    mesh = data_mesh(1)
    params: Any = jax.device_put(many_params(rng), NamedSharding(mesh, P()))
    before = jax.tree.map(np.array, params)
    for copies in (
        placement.copied(params, NamedSharding(mesh, P()), mesh=mesh),
        placement.on_one_device(params, mesh=mesh),
    ):
        jax.tree.map(np.testing.assert_array_equal, copies, before)
        pointers = jax.tree.map(
            lambda x, y: x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer(), copies, params
        )
        assert all(jax.tree.leaves(pointers))
