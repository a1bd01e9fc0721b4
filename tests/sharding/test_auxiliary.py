import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import sharding
from optim_zoo.errors import ArgumentValueError
from optim_zoo.sharding import Mean, Sum, WeightedLoss
from tests import cover
from tests.sharding.problem import RTOL, data_mesh

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

MODES = ("jit", "shard_map", "pmap")
ROWS = 32  # eight devices with four micro-batches have one row each
divisions = pytest.mark.parametrize(
    ("mode", "devices", "micro_batches"),
    [
        pytest.param(
            *division,
            # All modes, and calls with one row and with several; other sizes are similar.
            marks=[] if division[1:] in ((1, 2), (8, 1), (8, 4)) else pytest.mark.slow,
        )
        for division in itertools.product(MODES, (1, 8), (1, 2, 4))
    ],
)

few_divisions = pytest.mark.parametrize(
    ("mode", "devices", "micro_batches"),
    cover.mostly_slow(
        {f"{m}-{d}-{n}": (m, d, n) for m, d, n in itertools.product(MODES, (1, 8), (1, 2, 4))},
        ["jit-8-4", "shard_map-8-1", "pmap-1-2"],
        unpack=True,
    ),
)

PARAMS = {"w": jnp.asarray([0.5, -1.0, 0.25])}


@pytest.fixture
def batch(rng: np.random.Generator, key: jax.Array) -> Any:
    return {
        "x": rng.normal(size=(ROWS, 3)).astype(np.float32),
        # The first eight rows have no weight: all rows of some devices and micro-batches.
        "weight": np.float32(rng.integers(0, 5, ROWS) * (np.arange(ROWS) >= 8)),
        "id": np.arange(ROWS, dtype=np.int32),
        "key": jax.random.split(key, ROWS),
    }


def _losses(params: Any, batch: Any) -> jax.Array:
    return (batch["x"] @ params["w"]) ** 2


def _aux(params: Any, batch: Any) -> dict[str, Any]:
    """Returns aux of every kind, of a loss that is a mean."""
    x, positive = batch["x"], batch["x"] > 0
    return {
        "mean": jnp.mean(x),
        "mean in bfloat16": jnp.mean(x).astype("bfloat16"),
        "constant": 1.5,
        "count": jnp.sum(positive),
        "small count": jnp.sum(positive, dtype="int8"),
        "rows": len(x),
        "calls with a positive value": jnp.any(positive[:, 0]) | True,
        "nested": [None, {"per example": _losses(params, batch), "matrix": x}],
        "bfloat16 per example": x.astype("bfloat16"),
        "bool per example": positive,
        "id": batch["id"],
        "key": batch["key"],
        "marked mean": Mean(jnp.mean(x)),
        "mean of features": Mean(jnp.mean(x, 0)),
        "mean of integers": Mean(jnp.int32(len(PARAMS))),
        "tree of means": Mean({"a": jnp.mean(x, 0), "b": jnp.mean(x).astype("float16")}),
        "sum": Sum(jnp.sum(x)),
        "sum of features": Sum(jnp.sum(x, 0).astype("float16")),
        "histogram": Sum(jnp.sum(positive, 0)),
        "booleans": Sum(jnp.ones(3, bool)),
    }


def _mean_loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    return jnp.mean(_losses(params, batch)), _aux(params, batch)


def _weighted_loss(params: Any, batch: Any) -> tuple[WeightedLoss, Any]:
    weight = jnp.sum(batch["weight"])
    large = batch["x"][:, 0] > 1

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x * batch["weight"]) / weight  # 0 / 0 where a call has no weight

    return WeightedLoss(jnp.sum(_losses(params, batch) * batch["weight"]), weight), {
        "mean": mean(_losses(params, batch)),
        "mean of features": Mean(jax.vmap(mean, 1)(batch["x"])),
        "mean with a weight": Mean(
            jnp.sum(batch["x"][:, 1] * large) / jnp.sum(large), jnp.sum(large)
        ),
        "unweighted mean": Mean(jnp.mean(batch["x"], 0), len(large)),
        "count": jnp.sum(large),
        "sum": Sum(weight),
        "per example": batch["weight"],
    }


def _is_mark(x: Any) -> bool:
    return isinstance(x, Mean | Sum)


def _whole(loss_fn: Callable[..., Any], batch: Any) -> Any:
    """Returns aux of one call with the global batch, without marks, with numbers as arrays."""
    _, aux = loss_fn(PARAMS, batch)
    plain = jax.tree.map(lambda x: x.value if _is_mark(x) else x, aux, is_leaf=_is_mark)
    return jax.tree.map(jnp.asarray, plain)


def _step(loss_fn: Any, batch: Any, mode: str, devices: int, micro_batches: int) -> Any:
    step = sharding.data_parallel(
        loss_fn,
        optax.sgd(0.1),
        mesh=data_mesh(devices),
        mode=mode,
        micro_batches=micro_batches,
        has_aux=True,
    )
    *_, loss, aux = step(*step.init(PARAMS), batch)
    return loss, aux


def _assert_same(actual: Any, expected: Any) -> None:
    def same(x: jax.Array, y: jax.Array) -> None:
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        # Means of parts of a batch are rounded to the dtype of aux before they are combined.
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        rtol = max(RTOL, float(jnp.finfo(x.dtype).eps)) if inexact else 0
        x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
        np.testing.assert_allclose(x, y, rtol, rtol * max(1, np.abs(y).max()))

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(same, actual, expected)


@divisions
def test_aux_is_that_of_the_whole_batch(
    batch: Any, mode: str, devices: int, micro_batches: int
) -> None:
    """Two leaves show the rules for values that are not sums over the examples."""
    expected = _whole(_mean_loss, batch)
    expected["calls with a positive value"] = jnp.int32(devices * micro_batches)
    expected["booleans"] = jnp.full(3, devices * micro_batches, "int32")
    if mode == "jit" and micro_batches == 1:  # one call, whatever the number of devices
        expected["calls with a positive value"] = jnp.int32(1)
        expected["booleans"] = jnp.ones(3, "int32")
    expected["mean of integers"] = jnp.float32(1)
    _, aux = _step(_mean_loss, batch, mode, devices, micro_batches)
    _assert_same(aux, expected)


@few_divisions
def test_means_have_the_weights_of_the_loss_or_their_own(
    batch: Any, mode: str, devices: int, micro_batches: int
) -> None:
    loss, aux = _step(_weighted_loss, batch, mode, devices, micro_batches)
    _assert_same(aux, _whole(_weighted_loss, batch))
    np.testing.assert_allclose(loss, aux["mean"], rtol=RTOL)


@pytest.mark.parametrize("mode", MODES)
def test_a_mean_without_weight_is_zero(batch: Any, mode: str) -> None:
    nothing = {**batch, "weight": np.zeros(ROWS, np.float32)}
    loss, aux = _step(_weighted_loss, nothing, mode, 2, 2)
    assert loss == aux["mean"] == 0
    np.testing.assert_array_equal(aux["mean of features"], np.zeros(3))


@pytest.mark.parametrize("mode", MODES)
def test_arrays_may_follow_any_first_axis_of_the_batch(batch: Any, mode: str) -> None:
    pairs = {**batch, "pair": np.arange(2 * ROWS)}

    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.mean(_losses(params, batch)), (batch["pair"], batch["id"])

    _, aux = _step(loss_fn, pairs, mode, 2, 4)
    np.testing.assert_array_equal(aux[0], pairs["pair"])
    np.testing.assert_array_equal(aux[1], pairs["id"])


MARK = r"return sharding.Mean\(x\) for a mean over the examples, sharding.Sum\(x\) for a sum"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "statistic": (
        lambda batch: {"of": {"features": jnp.mean(batch["x"], 0)}},
        rf"of/features of shape \(3,\) and dtype float32 is not a scalar, .*: {MARK}",
    ),
    "fixed": (lambda batch: {"w": jnp.ones(4)}, rf"w of shape \(4,\) .*: {MARK}"),
    "first axis": (lambda batch: {"all": batch["x"].T}, rf"all of shape .*: {MARK}"),
    "second axis": (lambda batch: {"gram": batch["x"] @ batch["x"].T}, rf"gram of .*: {MARK}"),
    "raw key": (lambda batch: {"rng": jax.random.PRNGKey(0)}, r"rng of shape \(2,\) .* uint32"),
    "key": (
        lambda batch: {"rng": batch["key"][0]},
        r"rng of shape \(\) and dtype key<fry> can be neither .*: return one for each example",
    ),
    "marked key": (lambda batch: Sum(batch["key"][0]), "the value of shape .* can be neither"),
    "text": (lambda batch: [0.0, "text"], "1 is not an array but a str: leave it out of aux"),
    "texts": (lambda batch: {"a": np.array(["text"])}, "a is not an array but a ndarray: leave it"),
    "object": (lambda batch: {"a": Mean(object())}, "a is not an array but a object: leave it out"),
    "marked rows": (
        lambda batch: {"a": Sum({"b": batch["x"]})},
        "a/b of shape .* is marked as Sum, but its shape depends on the batch: reduce it",
    ),
    "weight": (
        lambda batch: {"a": Mean(jnp.mean(batch["x"]), batch["weight"])},
        r"a has a weight of shape .*: return Mean\(value, weight=scalar\)",
    ),
    "structure": (
        lambda batch: [jnp.mean(batch["x"])] * len(batch["x"]),
        "the value has a structure that depends on the size of the batch",
    ),
}


@pytest.mark.parametrize(("aux", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    ("mode", "devices", "micro_batches"),
    [("jit", 1, 1), ("jit", 2, 2), ("shard_map", 2, 1), ("pmap", 2, 2)],
)
def test_what_cannot_be_combined(
    batch: Any, mode: str, devices: int, micro_batches: int, aux: Any, message: str
) -> None:
    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.mean(_losses(params, batch)), aux(batch)

    with pytest.raises(ArgumentValueError, match=f"^aux of loss_fn: {message}") as caught:
        _step(loss_fn, batch, mode, devices, micro_batches)
    assert caught.value.argument == "loss_fn"


def test_an_error_with_twice_the_batch_has_a_note(batch: Any) -> None:
    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"].reshape(ROWS, 3) @ params["w"]), {"count": 1}

    with pytest.raises(TypeError, match="reshape") as caught:
        _step(loss_fn, batch, "jit", 1, 1)
    assert "traced the loss with twice the batch" in caught.value.__notes__[0]


def test_a_loss_without_aux_is_traced_once_a_call(batch: Any) -> None:
    traces = []

    def loss_fn(params: Any, batch: Any) -> Any:
        traces.append(len(batch["x"]))
        return jnp.mean(_losses(params, batch))

    step = sharding.data_parallel(loss_fn, optax.sgd(0.1), mesh=data_mesh(1))
    step(*step.init(PARAMS), batch)
    assert traces == [ROWS]


@pytest.mark.parametrize("mode", MODES)
def test_aux_keeps_its_dtypes_where_weights_are_float64(batch: Any, mode: str) -> None:
    with jax.enable_x64(True):
        _, aux = _step(_weighted_loss, batch, mode, 2, 2)
        _assert_same(aux, _whole(_weighted_loss, batch))
