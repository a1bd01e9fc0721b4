from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo.sharding import device_axis
from optim_zoo.sharding.auxiliary import Aux
from tests.sharding.problem import data_mesh

pytestmark = pytest.mark.newest

DEVICES = 4


@pytest.fixture
def by_device() -> NamedSharding:
    return NamedSharding(data_mesh(DEVICES), P("data"))


@pytest.mark.parametrize("add", [device_axis.added, device_axis.new_copies])
def test_every_device_has_a_copy(params: Any, by_device: NamedSharding, add: Any) -> None:
    copies = add(params, by_device)
    for name, x in params.items():
        assert copies[name].shape == (DEVICES, *x.shape)
        assert len(copies[name].addressable_shards) == DEVICES
        for shard in copies[name].addressable_shards:
            np.testing.assert_array_equal(shard.data[0], x)
    shapes = device_axis.copied_shapes(params, by_device)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, copies)


def test_the_device_axis_is_removed_again(params: Any, by_device: NamedSharding) -> None:
    plain = device_axis.removed(device_axis.added(params, by_device), by_device)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(plain))
    assert all(len(x.devices()) == DEVICES for x in jax.tree.leaves(plain))


def test_new_copies_outlive_their_source(params: Any, by_device: NamedSharding) -> None:
    expected = jax.device_get(params)
    copies = device_axis.new_copies(params, by_device)
    for x in jax.tree.leaves(params):
        x.delete()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), copies, expected)


def test_each_device_has_its_own_rows(batches: list[Any], by_device: NamedSharding) -> None:
    divided = device_axis.batch_divided(batches[0], by_device)
    for name, x in batches[0].items():
        for i, shard in enumerate(divided[name].addressable_shards):
            np.testing.assert_array_equal(shard.data[0], x[4 * i : 4 * i + 4])
    shapes = device_axis.divided_shapes(batches[0], by_device)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, divided)


def test_rows_of_aux_are_concatenated() -> None:
    rows = np.arange(24).reshape(DEVICES, 3, 2)
    aux = Aux({"rows": None, "scalar": np.ones(DEVICES)}, {"rows": rows, "scalar": None})
    joined = device_axis.removed_from_aux(aux).joined()
    np.testing.assert_array_equal(joined["rows"], np.arange(24).reshape(12, 2))
    assert joined["scalar"] == 1
