import contextlib
import dataclasses
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import accumulation, lamb, lars, metrics, ranger, sharding
from optim_zoo.sharding.losses import loss_and_aux
from tests.sharding.problem import (
    assert_same,
    data_mesh,
    many_params,
    mean_loss,
    weighted_loss,
)

pytestmark = pytest.mark.newest

# SGD as well as LAMB, whose trust ratio would hide a gradient of the wrong scale.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lamb": lambda: lamb(0.1, weight_decay=0.01),
}
every_mode = pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])


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
            loss, _ = loss_and_aux(loss_fn(params, batch), has_aux=False)
            return loss.total / loss.weight

        loss, grads = jax.value_and_grad(whole)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    losses = []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, np.asarray(losses)


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
def test_every_division_of_the_batch_is_the_whole_batch(
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
    assert_same(_train(step, params, batches), _by_hand(loss_fn, make(), params, batches))


@every_mode
def test_every_mode_fills_the_same_frozen_record(mode: str) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(2), mode=mode)
    assert type(step) is sharding.DataParallelStep
    assert len({step, sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(2))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.batch_divisor = 1  # type: ignore[misc]


@every_mode
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_weight_is_no_gradient(
    params: Any, batches: list[Any], micro_batches: int, mode: str
) -> None:
    step = sharding.data_parallel(
        weighted_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode, micro_batches=micro_batches
    )
    nothing = {**batches[0], "weight": np.zeros(16, np.float32)}
    after, losses = _train(step, params, [nothing])
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert losses == [0]


@every_mode
def test_steps_of_several_weighted_batches(params: Any, batches: list[Any], mode: str) -> None:
    """The step passes the weight of each batch to `accumulate`, so two halves equal the whole."""
    whole = jax.tree.map(lambda *x: np.concatenate(x), *batches[:2])
    tx = accumulation.accumulate(lamb(0.1), 2)
    step = sharding.data_parallel(weighted_loss, tx, mesh=data_mesh(2), mode=mode)
    actual, _ = _train(step, params, batches[:2])
    expected, _ = _by_hand(weighted_loss, lamb(0.1), params, [whole])
    assert_same(actual, expected)


def test_randomness_is_a_key_an_example(params: Any, batches: list[Any], key: jax.Array) -> None:
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
        results.append(_train(step, params, keyed))
    for result in results[1:]:
        assert_same(result, results[0])


@every_mode
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("placed", [False, True], ids=["anywhere", "in-place"])
def test_the_callers_parameters_live_on(
    params: Any, batches: list[Any], devices: int, placed: bool, mode: str
) -> None:
    """Also where they have the shardings of the step already, so that placing makes no copy."""
    before = jax.tree.map(np.array, params)
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(devices), mode=mode)
    if placed:
        params = jax.device_put(params, NamedSharding(data_mesh(devices), P()))
    _train(step, params, batches)
    _train(step, params, batches)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@every_mode
@pytest.mark.parametrize("device", [0, 1])
def test_parameters_that_live_on_one_device(
    params: Any, batches: list[Any], device: int, mode: str
) -> None:
    """They are committed to that device, as a checkpoint or ``jax.device_put`` leaves them."""
    placed = jax.device_put(params, jax.devices()[device])
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode)
    assert_same(_train(step, placed, batches), _train(step, params, batches))


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


@every_mode
@pytest.mark.parametrize("device", [0, 1])
def test_a_batch_that_lives_on_one_device(
    params: Any, batches: list[Any], device: int, mode: str
) -> None:
    placed = jax.device_put(batches, jax.devices()[device])
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(8), mode=mode)
    assert_same(_train(step, params, placed), _train(step, params, batches))


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
        whole = (leaf for leaf in jax.tree.leaves(old) if leaf.ndim > (mode == "pmap"))
        assert all(leaf.is_deleted() for leaf in whole)
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
    expected = _by_hand(mean_loss, optax.sgd(0.1), params, batches)
    assert_same(_train(step, params, batches), expected)


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
        return mean_loss(params, {**batch, "x": params["hidden"].T[jnp.int32(batch["weight"]) % 5]})

    def mesh(axis_type: AxisType) -> Mesh:
        return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    expected = _by_hand(loss_fn, optax.sgd(0.1), params, batches)
    with jax.set_mesh(mesh(ambient)) if ambient else contextlib.nullcontext():
        step = sharding.data_parallel(
            loss_fn, optax.sgd(0.1), mesh=mesh(axis_type), micro_batches=micro_batches
        )
        trained = _train(step, params, batches)
    assert_same(trained, expected)


@pytest.mark.parametrize("shape", [(12, 4), (0, 4), ()])
def test_a_batch_that_does_not_divide(params: Any, shape: tuple[int, ...]) -> None:
    step = sharding.data_parallel(mean_loss, optax.sgd(0.1), mesh=data_mesh(4), micro_batches=2)
    x, state = step.init(params)
    message = (
        r"must divide by 8 \(4 devices x 2 micro-batches\), got shape "
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


# Sharded parameters and state


def _many_loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None])
    odd = params["scale"] * jnp.sum(params["odd"] ** 2)
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2) + 0.01 * odd


MANY = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "lamb": lambda: lamb(0.1, weight_decay=0.01, phi_bounds=(0.1, 2.0)),
    "lars": lambda: lars(0.1, weight_decay=0.01, trust_coefficient=0.1, eps=1e-3, nesterov=True),
    "ranger": lambda: ranger(0.1, sync_period=2),
}
FSDP = [("hidden", P(None, "data")), ("out", P("data")), ("bias", P("data"))]


@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
@pytest.mark.parametrize("zero1", [None, "data"])
@pytest.mark.parametrize("rules", [(), FSDP], ids=["replicated", "fsdp"])
def test_sharded_parameters_and_state_are_the_same_step(
    rng: np.random.Generator, batches: list[Any], make: Any, zero1: str | None, rules: Any
) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(
        _many_loss, make(), mesh=data_mesh(8), zero1=zero1, param_shardings=rules, micro_batches=2
    )
    assert_same(_train(step, params, batches), _by_hand(_many_loss, make(), params, batches))


@pytest.mark.parametrize("rules", [(), FSDP], ids=["replicated", "fsdp"])
def test_each_device_holds_an_eighth_of_the_state(
    rng: np.random.Generator, batches: list[Any], rules: Any
) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(
        _many_loss, lamb(0.1), mesh=data_mesh(8), zero1="data", param_shardings=rules
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
    assert _compiled(step)._cache_size() == 1
    assert sharding.unspread(params, mesh=data_mesh(8), zero1="data") == ["odd", "scale"]


def test_the_gathered_parameters_are_plain(rng: np.random.Generator) -> None:
    params = many_params(rng)
    step = sharding.data_parallel(_many_loss, lamb(0.1), mesh=data_mesh(8), param_shardings=FSDP)
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
         r"param_shardings: odd of shape \(3, 5\) cannot be cut by .* over the mesh {'data': 8}"),
        ({"param_shardings": [("odd", "data")]}, TypeError,
         "param_shardings: odd must have a PartitionSpec, got 'data'"),
        ({"param_shardings": "odd"}, TypeError, "param_shardings must be a list of pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded(
    rng: np.random.Generator, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        step = sharding.data_parallel(_many_loss, lamb(0.1), mesh=data_mesh(8), **options)
        step.init(many_params(rng))


def test_pmap_takes_the_whole_mesh() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="mode 'pmap' must have the whole mesh along 'data'"):
        sharding.data_parallel(mean_loss, lamb(0.1), mesh=mesh, mode="pmap")


@every_mode
def test_a_step_can_be_compiled_without_arrays(params: Any, batches: list[Any], mode: str) -> None:
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(8), mode=mode)
    shapes = jax.eval_shape(lambda: params)
    memory = step.lower(shapes, batches[0]).compile().memory_analysis()
    held = 4 * (3 * 30 + 4 * 2 + 2)  # parameters and moments, norms of two layers, count and rate
    # Each device holds two rows of the batch and a copy of everything else. XLA leaves out what the
    # step does not read, and may align what it does.
    rows = sum(x.nbytes for x in jax.tree.leaves(batches[0])) // 8
    assert 0.8 * held < memory.argument_size_in_bytes < 1.5 * (held + rows)


def test_the_compiled_memory_is_that_of_the_spread_state() -> None:
    params = {"x": jax.ShapeDtypeStruct((1024, 64), jnp.float32)}

    def argument_bytes(**placing: Any) -> int:
        step = sharding.data_parallel(
            lambda params, batch: jnp.mean((batch @ params["x"]) ** 2),
            lamb(0.1),
            mesh=data_mesh(8),
            **placing,
        )
        lowered = step.lower(params, jax.ShapeDtypeStruct((8, 1024), jnp.float32))
        return lowered.compile().memory_analysis().argument_size_in_bytes

    size, small = 4 * 1024 * 64, 4 * 1024 + 256  # small: a row of the batch, and the scalars
    assert 3 * size < argument_bytes() < 3 * size + small
    assert 1.25 * size < argument_bytes(zero1="data") < 1.25 * size + small
    cut = {"zero1": "data", "param_shardings": [("x", P("data"))]}
    assert 0.375 * size < argument_bytes(**cut) < 0.375 * size + small


@pytest.mark.parametrize(
    "options", [{}, {"zero1": "data"}, {"mode": "shard_map"}, {"mode": "pmap"}], ids=str
)
def test_a_checkpoint_is_the_same_in_every_mode(
    params: Any, batches: list[Any], options: dict[str, Any]
) -> None:
    """`place` accepts what `uncopied` returns, also from another mode or as plain arrays."""
    like, of_one = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(1)).init(params)
    step = sharding.data_parallel(mean_loss, lamb(0.1), mesh=data_mesh(4), **options)
    x, state, _ = step(*step.init(params), batches[0])
    saved = step.uncopied((x, state))
    assert jax.tree.map(jnp.shape, saved) == jax.tree.map(jnp.shape, (like, of_one))
    assert metrics.read(saved[1]).keys() == metrics.read(of_one).keys()
    plain = jax.device_get(saved)
    assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(saved))
    expected, _, loss = step(x, state, batches[1])
    again, _, same_loss = step(*step.place(*plain), batches[1])
    jax.tree.map(np.testing.assert_array_equal, step.params(again), step.params(expected))
    assert float(loss) == float(same_loss)


def test_low_precision_gradients_are_added_in_float32(batches: list[Any]) -> None:
    """In bfloat16 each of the seven small terms, half a last digit of 1, would be lost."""
    small = np.full((8, 1), 2.0**-9, np.float32)
    small[0] = 1
    step = sharding.data_parallel(
        lambda params, batch: jnp.sum(params["w"] * batch["x"].astype("bfloat16")),
        optax.GradientTransformation(lambda params: (), lambda g, s, p: (g, s)),
        mesh=data_mesh(8),
        mode="shard_map",
    )
    params, state = step.init({"w": jnp.zeros((), "bfloat16")})
    lowered = step.lower(params, {"x": small}).as_text()
    (reduced,) = re.findall(r"all_reduce.*?\(tensor<(\w+)>\) -> tensor<\w+>", lowered, re.DOTALL)[
        :1
    ]
    assert reduced == "f32"
    moved, _, _ = step(params, state, {"x": small})
    np.testing.assert_array_equal(moved["w"], jnp.bfloat16((1 + 7 * 2.0**-9) / 8))


@pytest.mark.parametrize(
    "options",
    [{}, {"zero1": "data"}, {"param_shardings": FSDP}, {"mode": "shard_map"}],
    ids=["jit", "zero1", "fsdp", "shard_map"],
)
def test_gradients_are_added_over_devices_once_a_step(
    rng: np.random.Generator, batches: list[Any], options: Any
) -> None:
    """They are not added in every micro-batch, nor in the dtype of the model's arithmetic.

    A loop over micro-batches is a computation of its own in the compiled program, with a scan over
    the model's layers inside.
    """

    def loss(params: Any, batch: Any) -> jax.Array:
        def layer(hidden: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(hidden @ w.astype("bfloat16")), None

        hidden = (batch["x"] @ params["hidden"]).astype("bfloat16")
        hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
        return jnp.mean((hidden.astype("float32") @ params["out"] - batch["y"]) ** 2)

    params = {**many_params(rng), "layers": jnp.zeros((3, 16, 16))}
    step = sharding.data_parallel(loss, lamb(0.1), mesh=data_mesh(8), micro_batches=2, **options)
    text = step.lower(params, batches[0]).compile().as_text()
    computation, reduced = "", []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line
        if re.search(r"\b(all-reduce|reduce-scatter)(-start)?\(", line):
            assert computation.startswith("ENTRY"), line
            reduced.append(line)
    assert reduced
    assert not any("bf16" in line.split("(")[0] for line in reduced)
