import contextlib
import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, lamb, metrics, sharding
from tests.sharding.problem import (
    assert_same,
    data_mesh,
    mean_loss,
    on_one_device,
    train,
    weighted_loss,
)

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

# SGD as well as LAMB, whose trust ratio would hide a gradient of the wrong scale.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lamb": lambda: lamb(0.1, weight_decay=0.01),
}


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1)


def _lamb() -> optax.GradientTransformation:
    return lamb(0.1)


every_mode = pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])


@pytest.mark.diagonal
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("loss_fn", [mean_loss, weighted_loss])
@pytest.mark.parametrize(
    ("mode", "devices", "micro_batches"),
    [
        *(("jit", *sizes) for sizes in [(1, 1), (8, 1), (1, 4), (8, 2), (2, 8)]),
        *(("shard_map", *sizes) for sizes in [(8, 1), (2, 8)]),
        *(("pmap", *sizes) for sizes in [(2, 1), (8, 2)]),
    ],
)
def test_every_division_of_the_batch_gives_the_numbers_of_one_device(
    params: Any,
    batches: list[Any],
    make: Any,
    loss_fn: Any,
    mode: str,
    devices: int,
    micro_batches: int,
) -> None:
    step = sharding.data_parallel(
        loss_fn, make(), mesh=data_mesh(devices), mode=mode, micro_batches=micro_batches
    )
    assert step.batch_divisor == devices * micro_batches
    assert_same(train(step, params, batches), on_one_device(loss_fn, make, params, batches))


@every_mode
def test_every_mode_fills_the_same_frozen_record(mode: str) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(2), mode=mode)
    assert type(step) is sharding.DataParallelStep
    assert len({step, sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(2))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.batch_divisor = 1  # type: ignore[misc]


@pytest.mark.diagonal
@every_mode
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_weight_is_no_gradient(
    params: Any, batches: list[Any], micro_batches: int, mode: str
) -> None:
    step = sharding.data_parallel(
        weighted_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode, micro_batches=micro_batches
    )
    nothing = {**batches[0], "weight": np.zeros(16, np.float32)}
    after, losses = train(step, params, [nothing])
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert losses == [0]


@every_mode
def test_steps_of_several_weighted_batches(params: Any, batches: list[Any], mode: str) -> None:
    """The step passes the weight of each batch to `accumulate`: two halves equal one batch."""
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches[:2])
    tx = accumulation.accumulate(lamb(0.1), 2)
    step = sharding.data_parallel(weighted_loss, tx, mesh=data_mesh(2), mode=mode)
    actual, _ = train(step, params, batches[:2])
    expected, _ = on_one_device(weighted_loss, _lamb, params, [joined])
    assert_same(actual, expected)


def test_randomness_is_a_key_for_each_example(
    params: Any, batches: list[Any], key: jax.Array
) -> None:
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(batch["key"])
        return mean_loss(params, {**batch, "x": batch["x"] + noise})

    keyed = [{**batch, "key": jax.random.split(key, 16)} for batch in batches]
    results = []
    for mode, devices, micro_batches in (
        ("jit", 1, 1),
        ("jit", 8, 2),
        ("shard_map", 8, 2),
        ("pmap", 8, 2),
    ):
        step = sharding.data_parallel(
            loss_fn, optax.sgd(0.1), mesh=data_mesh(devices), mode=mode, micro_batches=micro_batches
        )
        results.append(train(step, params, keyed))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.diagonal
@every_mode
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("placed", [False, True], ids=["anywhere", "in-place"])
def test_the_callers_parameters_are_not_donated(
    params: Any, batches: list[Any], devices: int, placed: bool, mode: str
) -> None:
    """Also where they already have the shardings of the step, so that placing makes no copy."""
    before = jax.tree.map(np.array, params)
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(devices), mode=mode)
    if placed:
        params = jax.device_put(params, NamedSharding(data_mesh(devices), P()))
    train(step, params, batches)
    train(step, params, batches)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.diagonal
@every_mode
@pytest.mark.parametrize("device", [0, 1])
def test_parameters_on_one_device(params: Any, batches: list[Any], device: int, mode: str) -> None:
    """They are committed to that device, as a checkpoint or ``jax.device_put`` leaves them."""
    placed = jax.device_put(params, jax.devices()[device])
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode)
    assert_same(train(step, placed, batches), train(step, params, batches))


@every_mode
def test_parameters_may_be_numbers_and_numpy_arrays(mode: str) -> None:
    step = sharding.data_parallel(
        lambda params, batch: jnp.mean(batch @ params["w"]) + params["b"],
        optax.sgd(0.5),
        mesh=data_mesh(2),
        mode=mode,
    )
    params = {"w": np.zeros((3, 2), np.float32), "b": 1.0}
    x, _, loss = step(*step.init(params), np.ones((2, 3), np.float32))
    assert loss == 1
    assert step.params(x)["b"] == 0.5
    np.testing.assert_array_equal(params["w"], 0)


@pytest.mark.diagonal
@every_mode
@pytest.mark.parametrize("device", [0, 1])
def test_a_batch_on_one_device(params: Any, batches: list[Any], device: int, mode: str) -> None:
    placed = jax.device_put(batches, jax.devices()[device])
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode)
    assert_same(train(step, params, placed), train(step, params, batches))


@every_mode
def test_state_is_donated_and_nothing_compiles_twice(
    params: Any, batches: list[Any], mode: str, compilations: list[str]
) -> None:
    traces = []

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return mean_loss(params, batch)

    step = sharding.data_parallel(loss_fn, lamb(0.1), mesh=data_mesh(8), mode=mode, micro_batches=2)
    x, state = step.init(params)
    first = 0
    for batch in batches:
        old = (x, state)
        x, state, _ = step(x, state, batch)
        # Norms of the last step are not read by the next: jit prunes them, and donates the rest.
        arrays = (leaf for leaf in jax.tree.leaves(old) if leaf.ndim > (mode == "pmap"))
        assert all(leaf.is_deleted() for leaf in arrays)
        # value_and_grad inside scan traces the loss a fixed number of times, in the first call.
        first = first or len(traces)
        assert compilations or batch is not batches[0]
        assert not compilations or batch is batches[0]
        compilations.clear()
    step(x, state, batches[0])
    assert len(traces) == first
    assert not compilations
    if mode != "pmap":  # jax.pmap has no cache to inspect
        assert _compiled(step)._cache_size() == 1


def _compiled(step: sharding.DataParallelStep) -> Any:
    """Returns the function that ``jax.jit`` returned; the record does not expose it."""
    return inspect.getclosurevars(step.step).nonlocals["compiled"]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tx", [optax.sgd(0.1), lamb(0.1)], ids=["sgd", "lamb"])
def test_low_precision_parameters_stay_so(
    params: Any, batches: list[Any], tx: optax.GradientTransformation, micro_batches: int
) -> None:
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    step = sharding.data_parallel(mean_loss, tx, mesh=data_mesh(2), micro_batches=micro_batches)
    x, state = step.init(low)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    for batch in batches:
        x, state, loss = step(x, state, batch)
        assert loss.dtype == jnp.float32
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(x))
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == dtypes


def test_everything_is_on_every_device(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(8))
    x, state = step.init(params)
    for leaf in jax.tree.leaves((x, state)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8
    for leaf in jax.tree.leaves(step(x, state, batches[0])):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8


def test_metrics_come_out(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.5), mesh=data_mesh(8))
    x, state = step.init(params)
    _, state, _ = step(x, state, batches[0])
    assert metrics.read(state)["learning_rate"] == 0.5


def test_the_loss_reaches_the_optimizer(params: Any, batches: list[Any]) -> None:
    seen = optax.GradientTransformationExtraArgs(
        lambda _: jnp.zeros(()), lambda u, _, params=None, *, value: (u, value)
    )
    step = sharding.data_parallel(mean_loss, seen, mesh=data_mesh(2), micro_batches=2)
    x, state = step.init(params)
    _, state, loss = step(x, state, batches[0])
    assert state == loss


def test_only_the_batch_axis_divides_the_batch(params: Any, batches: list[Any]) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=mesh, micro_batches=2)
    assert step.batch_divisor == 8
    expected = on_one_device(mean_loss, _sgd, params, batches)
    assert_same(train(step, params, batches), expected)


def _lookup_loss(params: Any, batch: Any) -> jax.Array:
    return mean_loss(params, {**batch, "x": params["hidden"].T[jnp.int32(batch["weight"]) % 5]})


@pytest.mark.diagonal
@pytest.mark.parametrize("ambient", [None, AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_any_mesh_takes_any_loss(
    params: Any,
    batches: list[Any],
    axis_type: AxisType,
    ambient: AxisType | None,
    micro_batches: int,
) -> None:
    """`jax.make_mesh` makes Explicit axes, over which an embedding lookup would be refused."""

    def mesh(axis_type: AxisType) -> Mesh:
        return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    expected = on_one_device(_lookup_loss, _sgd, params, batches)
    with jax.set_mesh(mesh(ambient)) if ambient else contextlib.nullcontext():
        step = sharding.data_parallel(
            _lookup_loss, optax.sgd(0.1), mesh=mesh(axis_type), micro_batches=micro_batches
        )
        trained = train(step, params, batches)
    assert_same(trained, expected)


@pytest.mark.parametrize("shape", [(12, 4), (0, 4), ()])
def test_a_batch_that_does_not_divide(params: Any, shape: tuple[int, ...]) -> None:
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(4), micro_batches=2)
    x, state = step.init(params)
    message = (
        r"must be divisible by 8 \(4 devices x 2 micro-batches\), got shape "
        + str(shape).replace("(", r"\(").replace(")", r"\)")
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        step(x, state, {"x": np.ones((16, 4)), "y": np.ones(shape)})


def test_errors() -> None:
    arguments = {"loss_fn": mean_loss, "tx": optax.sgd(0.1), "mesh": data_mesh(2)}
    with pytest.raises(ValueError, match="unknown mode 'threads'; expected jit, shard_map, pmap"):
        sharding.data_parallel(**arguments, mode="threads")
    with pytest.raises(ValueError, match=r"batch_axis must be one of \('data',\), got 'batch'"):
        sharding.data_parallel(**arguments, batch_axis="batch")
    with pytest.raises(ValueError, match="micro_batches must be >= 1, got 0"):
        sharding.data_parallel(**arguments, micro_batches=0)


def test_params_are_plain_and_outlive_the_next_step(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(4))
    trained, state = step.init(params)
    plain = step.params(trained)
    before = jax.device_get(plain)
    step(trained, state, batches[0])  # donates its arguments
    assert_same(plain, before)
    for x in jax.tree.leaves(plain):
        assert len(x.devices()) == 1


def test_pmap_takes_the_whole_mesh() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="mode 'pmap' must have the whole mesh along 'data'"):
        sharding.data_parallel(mean_loss, lamb(0.1), mesh=mesh, mode="pmap")


@pytest.mark.parametrize(
    "options", [{}, {"zero1": "data"}, {"mode": "shard_map"}, {"mode": "pmap"}], ids=str
)
def test_a_checkpoint_is_the_same_in_every_mode(
    params: Any, batches: list[Any], options: dict[str, Any]
) -> None:
    """`place` accepts what `global_arrays` returns, also from another mode or as plain arrays."""
    like, of_one = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(1)).init(params)
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(4), **options)
    x, state, _ = step(*step.init(params), batches[0])
    saved = step.global_arrays((x, state))
    assert jax.tree.map(jnp.shape, saved) == jax.tree.map(jnp.shape, (like, of_one))
    assert metrics.read(saved[1]).keys() == metrics.read(of_one).keys()
    plain = jax.device_get(saved)
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(saved))
    expected, _, loss = step(x, state, batches[1])
    again, _, same_loss = step(*step.place(*plain), batches[1])
    jax.tree.map(np.testing.assert_array_equal, step.params(again), step.params(expected))
    assert float(loss) == float(same_loss)
