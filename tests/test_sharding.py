import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import lamb, metrics, sharding

# SGD beside LAMB: a trust ratio would hide a gradient of the wrong scale.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lamb": lambda: lamb(0.1, weight_decay=0.01),
}
# Sums over devices and micro-batches add in another order: some 1e-7 of the largest entries.
RTOL = 2e-6


def _mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def _mean_loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def _weighted_loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(batch["x"] @ params["hidden"])
    losses = jnp.mean((hidden @ params["out"] - batch["y"]) ** 2, axis=-1)
    return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"])


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return {
        "hidden": jnp.asarray(rng.normal(size=(4, 5)), "float32"),
        "out": jnp.asarray(rng.normal(size=(5, 2)), "float32"),
    }


@pytest.fixture
def batches(rng: np.random.Generator) -> list[Any]:
    """Weights so uneven that a mean of means is far off: whole devices may weigh nothing."""
    return [
        {
            "x": rng.normal(size=(16, 4)).astype(np.float32),
            "y": rng.normal(size=(16, 2)).astype(np.float32),
            "weight": np.float32(rng.integers(1, 9, 16) * (np.arange(16) % 5 < 2)),
        }
        for _ in range(3)
    ]


def _train(
    step: sharding.DataParallelStep, params: Any, batches: list[Any]
) -> tuple[Any, np.ndarray]:
    params, state = step.init(params)
    losses = []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return step.params(params), np.asarray(losses)


def _by_hand(
    loss_fn: Any, tx: optax.GradientTransformation, params: Any, batches: list[Any]
) -> tuple[Any, np.ndarray]:
    """The whole batch at once on one device."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def whole(params: Any) -> jax.Array:
            value = loss_fn(params, batch)
            return value[0] / value[1] if isinstance(value, tuple) else value

        loss, grads = jax.value_and_grad(whole)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    losses = []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, np.asarray(losses)


def _assert_same(actual: Any, expected: Any) -> None:
    def assert_leaf_same(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, RTOL, RTOL * np.abs(y).max())

    jax.tree.map(assert_leaf_same, actual, expected)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("loss_fn", [_mean_loss, _weighted_loss])
@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 1), (8, 1), (1, 4), (8, 2), (2, 8)])
def test_every_cut_of_the_batch_is_the_whole_batch(
    params: Any, batches: list[Any], make: Any, loss_fn: Any, devices: int, micro_batches: int
) -> None:
    step = sharding.data_parallel(loss_fn, make(), mesh=_mesh(devices), micro_batches=micro_batches)
    assert step.batch_divisor == devices * micro_batches
    _assert_same(_train(step, params, batches), _by_hand(loss_fn, make(), params, batches))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_weight_is_no_gradient(params: Any, batches: list[Any], micro_batches: int) -> None:
    step = sharding.data_parallel(
        _weighted_loss, optax.sgd(0.1), mesh=_mesh(8), micro_batches=micro_batches
    )
    nothing = {**batches[0], "weight": np.zeros(16, np.float32)}
    after, losses = _train(step, params, [nothing])
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert losses == [0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_aux(params: Any, batches: list[Any], micro_batches: int) -> None:
    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _mean_loss(params, batch), {"rows": batch["x"][:, 0], "count": jnp.ones(())}

    step = sharding.data_parallel(
        loss_fn, optax.sgd(0.1), mesh=_mesh(4), micro_batches=micro_batches, has_aux=True
    )
    expected = _mean_loss(params, batches[0])
    x, state = step.init(params)
    _, _, loss, aux = step(x, state, batches[0])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # Every row is in one micro-batch, once.
    np.testing.assert_array_equal(np.sort(aux["rows"].reshape(-1)), np.sort(batches[0]["x"][:, 0]))
    assert aux["rows"].shape == ((16,) if micro_batches == 1 else (micro_batches, 8))
    assert aux["count"].shape == (() if micro_batches == 1 else (micro_batches,))


def test_randomness_is_a_key_an_example(params: Any, batches: list[Any], key: jax.Array) -> None:
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(batch["key"])
        return _mean_loss(params, {**batch, "x": batch["x"] + noise})

    keyed = [{**batch, "key": jax.random.split(key, 16)} for batch in batches]
    results = []
    for devices, micro_batches in ((1, 1), (8, 2)):
        step = sharding.data_parallel(
            loss_fn, optax.sgd(0.1), mesh=_mesh(devices), micro_batches=micro_batches
        )
        results.append(_train(step, params, keyed))
    _assert_same(*results)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("placed", [False, True], ids=["anywhere", "in-place"])
def test_the_callers_parameters_live_on(
    params: Any, batches: list[Any], devices: int, placed: bool
) -> None:
    """Also where they already lie as the step wants them, so that placing makes no copy."""
    before = jax.tree.map(np.array, params)
    step = sharding.data_parallel(_mean_loss, lamb(0.1), mesh=_mesh(devices))
    if placed:
        params = jax.device_put(params, NamedSharding(_mesh(devices), P()))
    _train(step, params, batches)
    _train(step, params, batches)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("device", [0, 1])
def test_parameters_that_live_on_one_device(params: Any, batches: list[Any], device: int) -> None:
    """As a checkpoint or ``jax.device_put`` leaves them: committed to that device."""
    placed = jax.device_put(params, jax.devices()[device])
    step = sharding.data_parallel(_mean_loss, optax.sgd(0.1), mesh=_mesh(8))
    _assert_same(_train(step, placed, batches), _train(step, params, batches))


@pytest.mark.parametrize("device", [0, 1])
def test_a_batch_that_lives_on_one_device(params: Any, batches: list[Any], device: int) -> None:
    placed = jax.device_put(batches, jax.devices()[device])
    step = sharding.data_parallel(_mean_loss, optax.sgd(0.1), mesh=_mesh(8))
    _assert_same(_train(step, params, placed), _train(step, params, batches))


def test_state_is_donated_and_nothing_compiles_twice(params: Any, batches: list[Any]) -> None:
    traces = []

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return _mean_loss(params, batch)

    step = sharding.data_parallel(loss_fn, lamb(0.1), mesh=_mesh(8), micro_batches=2)
    x, state = step.init(params)
    for batch in batches:
        old = (x, state)
        x, state, _ = step(x, state, batch)
        # Norms of the last step are not read by the next: jit prunes them, and donates the rest.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.ndim)
    # value_and_grad inside scan traces the loss a fixed number of times, in the first call only.
    first = len(traces)
    step(x, state, batches[0])
    assert len(traces) == first
    assert step._step._cache_size() == 1


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tx", [optax.sgd(0.1), lamb(0.1)], ids=["sgd", "lamb"])
def test_low_precision_parameters_stay_so(
    params: Any, batches: list[Any], tx: optax.GradientTransformation, micro_batches: int
) -> None:
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    step = sharding.data_parallel(_mean_loss, tx, mesh=_mesh(2), micro_batches=micro_batches)
    x, state = step.init(low)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    for batch in batches:
        x, state, loss = step(x, state, batch)
        assert loss.dtype == jnp.float32
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(x))
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == dtypes


def test_everything_is_on_every_device(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(_mean_loss, lamb(0.1), mesh=_mesh(8))
    x, state = step.init(params)
    for leaf in jax.tree.leaves((x, state)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8
    for leaf in jax.tree.leaves(step(x, state, batches[0])):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8


def test_metrics_come_out(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(_mean_loss, lamb(0.5), mesh=_mesh(8))
    x, state = step.init(params)
    _, state, _ = step(x, state, batches[0])
    assert metrics.read(state)["learning_rate"] == 0.5


def test_the_loss_reaches_the_optimizer(params: Any, batches: list[Any]) -> None:
    seen = optax.GradientTransformationExtraArgs(
        lambda _: jnp.zeros(()), lambda u, _, params=None, *, value: (u, value)
    )
    step = sharding.data_parallel(_mean_loss, seen, mesh=_mesh(2), micro_batches=2)
    x, state = step.init(params)
    _, state, loss = step(x, state, batches[0])
    assert state == loss


def test_only_the_batch_axis_cuts_the_batch(params: Any, batches: list[Any]) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = sharding.data_parallel(_mean_loss, optax.sgd(0.1), mesh=mesh, micro_batches=2)
    assert step.batch_divisor == 8
    expected = _by_hand(_mean_loss, optax.sgd(0.1), params, batches)
    _assert_same(_train(step, params, batches), expected)


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

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return _mean_loss(
            params, {**batch, "x": params["hidden"].T[jnp.int32(batch["weight"]) % 5]}
        )

    def mesh(axis_type: AxisType) -> Mesh:
        return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    expected = _by_hand(loss_fn, optax.sgd(0.1), params, batches)
    with jax.set_mesh(mesh(ambient)) if ambient else contextlib.nullcontext():
        step = sharding.data_parallel(
            loss_fn, optax.sgd(0.1), mesh=mesh(axis_type), micro_batches=micro_batches
        )
        trained = _train(step, params, batches)
    _assert_same(trained, expected)


@pytest.mark.parametrize("shape", [(12, 4), (0, 4), ()])
def test_a_batch_that_does_not_divide(params: Any, shape: tuple[int, ...]) -> None:
    step = sharding.data_parallel(_mean_loss, optax.sgd(0.1), mesh=_mesh(4), micro_batches=2)
    x, state = step.init(params)
    message = (
        r"must divide by 8 \(4 devices x 2 micro-batches\), got shape "
        + str(shape).replace("(", r"\(").replace(")", r"\)")
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        step(x, state, {"x": np.ones((16, 4)), "y": np.ones(shape)})


def test_errors() -> None:
    arguments = {"loss_fn": _mean_loss, "tx": optax.sgd(0.1), "mesh": _mesh(2)}
    with pytest.raises(ValueError, match="mode must be 'jit', got 'threads'"):
        sharding.data_parallel(**arguments, mode="threads")
    with pytest.raises(ValueError, match=r"batch_axis must be one of \('data',\), got 'batch'"):
        sharding.data_parallel(**arguments, batch_axis="batch")
    with pytest.raises(ValueError, match="micro_batches must be >= 1, got 0"):
        sharding.data_parallel(**arguments, micro_batches=0)


def test_params_are_plain_and_outlive_the_next_step(params: Any, batches: list[Any]) -> None:
    step = sharding.data_parallel(_mean_loss, lamb(0.1), mesh=_mesh(4))
    trained, state = step.init(params)
    plain = step.params(trained)
    before = jax.device_get(plain)
    step(trained, state, batches[0])  # donates what it is given
    _assert_same(plain, before)
    for x in jax.tree.leaves(plain):
        assert len(x.devices()) == 1
