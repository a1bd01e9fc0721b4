"""Sharded parameters and optimizer state: ZeRO-1 and ``param_shardings``."""

import inspect
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optim_zoo import lamb, lars, ranger, sharding
from tests.sharding.problem import (
    FSDP,
    assert_same,
    data_mesh,
    many_loss,
    many_params,
    on_one_device,
    train,
)

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

MANY = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lamb": lambda: lamb(0.1, weight_decay=0.01, phi_bounds=(0.1, 2.0)),
    "lars": lambda: lars(0.1, weight_decay=0.01, trust_coefficient=0.1, eps=1e-3, nesterov=True),
    "ranger": lambda: ranger(0.1, sync_period=2),
}


PLACED = {"zero1": ("data", ()), "zero1 and fsdp": ("data", FSDP), "fsdp": (None, FSDP),
          "replicated": (None, ())}  # fmt: skip


@pytest.mark.diagonal
@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
@pytest.mark.parametrize(("zero1", "rules"), PLACED.values(), ids=PLACED)
def test_sharded_parameters_and_state_are_the_same_step(
    rng: np.random.Generator, batches: list[Any], make: Any, zero1: str | None, rules: Any
) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(
        many_loss, make(), mesh=data_mesh(8), zero1=zero1, param_shardings=rules, micro_batches=2
    )
    assert_same(train(step, params, batches), on_one_device(many_loss, make, params, batches))


@pytest.mark.parametrize("rules", [(), FSDP], ids=["replicated", "fsdp"])
def test_each_device_holds_an_eighth_of_the_state(
    rng: np.random.Generator, batches: list[Any], rules: Any
) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(
        many_loss, lamb(0.1), mesh=data_mesh(8), zero1="data", param_shardings=rules
    )
    x, state = step.init(params)
    for _ in range(2):
        adam = optax.tree.get(state, "ScaleByAdamState")
        for moments in (adam.mu, adam.nu):
            for path in ("hidden", "out", "bias"):
                assert moments[path].addressable_data(0).size * 8 == moments[path].size
            for path in ("odd", "scale"):
                assert moments[path].sharding.is_fully_replicated
        for path in ("hidden", "out", "bias"):
            assert x[path].sharding.is_fully_replicated == (rules == ())
        x, state, _ = step(x, state, batches[0])
    compiled = inspect.getclosurevars(step.step).nonlocals["compiled"]
    assert compiled._cache_size() == 1
    assert sharding.unsharded_by_zero1(params, mesh=data_mesh(8), zero1="data") == ["odd", "scale"]


def test_the_gathered_parameters_are_plain(rng: np.random.Generator) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(many_loss, lamb(0.1), mesh=data_mesh(8), param_shardings=FSDP)
    x, _ = step.init(params)
    plain = step.params(x)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(plain))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"zero1": "model"}, ValueError, r"zero1 must be one of \('data',\), got 'model'"),
        ({"zero1": "data", "mode": "pmap"}, ValueError, "zero1 belongs to mode 'jit', got it with"),
        ({"param_shardings": FSDP, "mode": "shard_map"}, ValueError,
         "param_shardings belongs to mode 'jit'"),
        ({"param_shardings": [("hiden", P("data"))]}, ValueError,
         "param_shardings: 'hiden' matches no leaf; the nearest paths are hidden"),
        ({"param_shardings": [("odd", P("data"))]}, ValueError,
         r"param_shardings: odd of shape \(3, 5\) cannot be sharded by .* over the mesh "
         r"{'data': 8}"),
        ({"param_shardings": [("odd", "data")]}, TypeError,
         "param_shardings: odd must have a PartitionSpec, got 'data'"),
        ({"param_shardings": "odd"}, TypeError, "param_shardings must be a list of pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded(
    rng: np.random.Generator, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        step = sharding.data_parallel(many_loss, lamb(0.1), mesh=data_mesh(8), **options)
        step.init(many_params(rng))
