"""Tests of ``data_parallel(..., noise_scale=True)``; `tests.wrappers.test_noise_scale` has more."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, guards, lamb, metrics, saved_state, sharding
from optim_zoo.wrappers.noise_scale import NoiseScaleState
from tests.sharding.problem import data_mesh, mean_loss, weighted_loss

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

DECAY = 0.5


def _read(step: Any, state: Any) -> float:
    return float(metrics.read(step.global_arrays(state))["gradient_noise_scale"])


def _divided(batch: Any, devices: int, micro_batches: int) -> list[Any]:
    """Returns the batches that the loss is called with."""
    calls = []
    for device in range(devices):
        rows = jax.tree.map(lambda x: np.split(x, devices)[device], batch)  # noqa: B023
        calls += [
            jax.tree.map(lambda x: x[m::micro_batches], rows)  # noqa: B023
            for m in range(micro_batches)
        ]
    return calls


@jax.jit
def _gradient(params: Any, batch: Any) -> tuple[Any, jax.Array]:
    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        loss = weighted_loss(params, batch)
        return loss.total, loss.weight

    return jax.grad(total, has_aux=True)(params)


def _expected(params: Any, batches: list[Any], devices: int, micro_batches: int) -> float:
    """Returns the noise scale at fixed parameters by its definition, in float64."""
    averages = np.zeros(2)
    for batch in batches:
        found = [_gradient(params, call) for call in _divided(batch, devices, micro_batches)]
        w = np.array([weight for _, weight in found], np.float64)
        totals = np.array(
            [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g, _ in found]
        ).astype(np.float64)[w > 0]
        w = w[w > 0]
        mean = totals.sum(0) / w.sum()
        trace = ((totals**2).sum(1) @ (1 / w) - w.sum() * mean @ mean) / (len(w) - 1)
        estimates = np.array([trace, mean @ mean - trace / w.sum()])
        averages = DECAY * averages + (1 - DECAY) * estimates
    return averages[0] / averages[1]


@pytest.mark.parametrize(
    ("mode", "devices", "micro_batches", "options"),
    [
        ("jit", 8, 1, {"zero1": "data"}),
        ("jit", 1, 8, {}),
        ("jit", 2, 4, {"param_shardings": [("out", P(None, "data"))]}),
        ("shard_map", 8, 1, {}),
        ("shard_map", 4, 2, {}),
        ("pmap", 8, 1, {}),
        ("pmap", 2, 4, {}),
    ],
)
def test_the_noise_scale_is_that_of_the_definition(
    params: Any,
    batches: list[Any],
    mode: str,
    devices: int,
    micro_batches: int,
    options: dict[str, Any],
) -> None:
    """The parameters are fixed, and some devices may have no weight."""
    step = sharding.data_parallel(
        weighted_loss,
        optax.sgd(0.0),
        mesh=data_mesh(devices),
        mode=mode,
        micro_batches=micro_batches,
        noise_scale=True,
        noise_decay=DECAY,
        **options,
    )
    placed, state = step.init(params)
    assert isinstance(state, NoiseScaleState)
    for batch in batches:
        placed, state, _ = step(placed, state, batch)
    expected = _expected(params, batches, devices, micro_batches)
    assert np.isfinite(expected)
    # A difference of sums of squares, in float32: their rounding, 1e-7, times about 10.
    np.testing.assert_allclose(_read(step, state), expected, rtol=1e-5)


def test_devices_and_micro_batches_give_the_same_number(params: Any, batches: list[Any]) -> None:
    """Eight devices on rows in order; one device whose micro-batches are the same rows."""
    order = np.arange(16).reshape(8, 2).T.ravel()  # micro-batch m has the rows m, m + 8
    found = []
    for devices, rows in ((8, np.arange(16)), (1, order)):
        step = sharding.data_parallel(
            mean_loss,
            lamb(0.1),
            mesh=data_mesh(devices),
            micro_batches=8 // devices,
            noise_scale=True,
        )
        x, state = step.init(params)
        for batch in batches:
            x, state, _ = step(x, state, {name: value[rows] for name, value in batch.items()})
        found.append(_read(step, state))
    np.testing.assert_allclose(*found, rtol=1e-4)  # the parameters differ by 1e-6 after 3 steps


def test_other_mesh_axes(params: Any, batches: list[Any]) -> None:
    """Squares are summed over the axis that parameters are sharded over, but not over devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step = sharding.data_parallel(
        weighted_loss,
        optax.sgd(0.0),
        mesh=mesh,
        micro_batches=2,
        param_shardings=[("out", P(None, "model"))],
        noise_scale=True,
        noise_decay=DECAY,
    )
    placed, state = step.init(params)
    assert placed["out"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    for batch in batches:
        placed, state, _ = step(placed, state, batch)
    np.testing.assert_allclose(_read(step, state), _expected(params, batches, 4, 2), rtol=1e-5)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_nothing_else_changes(params: Any, batches: list[Any], mode: str) -> None:
    """Also with a guard inside, which skips the second step; its NaN is not measured."""
    tx = guards.skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    broken = {**batches[1], "y": np.full_like(batches[1]["y"], np.nan)}
    made = []
    for noise_scale in (False, True):
        step = sharding.data_parallel(
            weighted_loss, tx, mesh=data_mesh(2), mode=mode, noise_scale=noise_scale
        )
        x, state = step.init(params)
        seen = []
        for batch in (batches[0], broken):
            x, state, loss = step(x, state, batch)
            seen.append(float(loss))
            if noise_scale:
                assert 0 < _read(step, state) < np.inf
        made.append((step.params(x), state.inner if noise_scale else state, seen))
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_extra_arguments_reach_an_optimizer_that_accepts_only_some(
    params: Any, batches: list[Any]
) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any) -> tuple[Any, Any]:
        return updates, value

    tx = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    step = sharding.data_parallel(
        mean_loss, tx, mesh=data_mesh(1), micro_batches=2, noise_scale=True
    )
    _, state, loss = step(*step.init(params), batches[0])
    assert float(state.inner) == float(loss)


def test_the_state_is_saved_with_that_of_the_optimizer(params: Any, batches: list[Any]) -> None:
    options: Any = {"mesh": data_mesh(4), "noise_scale": True}
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), **options, mode="pmap")
    x, state, _ = step(*step.init(params), batches[0])
    saved = jax.device_get(step.global_arrays((x, state)))
    x, state, _ = step(x, state, batches[1])
    other = sharding.data_parallel(mean_loss, optax.sgd(0.1), **options)
    _, like = other.init(params)
    saved_state.check(saved_state.describe(saved[1]), like)
    _, resumed, _ = other(*other.place(*saved), batches[1])
    np.testing.assert_allclose(_read(other, resumed), _read(step, state), rtol=1e-5)
    without = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(4)).init(params)[1]
    with pytest.raises(ValueError, match="NoiseScaleState"):
        saved_state.check(saved_state.describe(saved[1]), without)


def test_two_of_them_cannot_be_read_at_once(params: Any) -> None:
    tx = accumulation.accumulate(optax.sgd(0.1), 2, noise_scale=True)
    step = sharding.data_parallel(mean_loss, tx, mesh=data_mesh(2), noise_scale=True)
    _, state = step.init(params)
    with pytest.raises(ValueError, match="several values of gradient_noise_scale"):
        metrics.read(state)
    assert np.isnan(metrics.read(state.inner)["gradient_noise_scale"])


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        (1, {}, r"noise_scale must be False unless .* several devices, or pass micro_batches=2"),
        (8, {"param_shardings": [("out", P("data"))]}, r"noise_scale .* pass micro_batches=2"),
        (8, {"noise_decay": -0.1}, r"noise_decay must be in \[0, 1\), got -0.1"),
    ],
)
def test_what_is_refused(devices: int, options: dict[str, Any], message: str) -> None:
    arguments = {"mesh": data_mesh(devices), "noise_scale": True, **options}
    with pytest.raises(ValueError, match=message):
        sharding.data_parallel(mean_loss, lamb(0.1), **arguments)
