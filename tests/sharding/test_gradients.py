import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo.sharding.auxiliary import Aux
from optim_zoo.sharding.gradients import mean_gradient, mean_gradient_by_device
from optim_zoo.sharding.losses import loss_and_aux
from tests.sharding.problem import assert_same, data_mesh, mean_loss, weighted_loss

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

DEVICES = 8
every_loss = pytest.mark.parametrize("loss_fn", [mean_loss, weighted_loss])
every_count = pytest.mark.parametrize("micro_batches", [1, 2, 4])

Result = tuple[Any, Any, Any, Any, Any]  # loss, weight, gradient, aux, spread


def _by_definition(loss_fn: Any, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Returns the mean loss and its gradient, of the global batch on one device."""

    def mean(params: Any) -> jax.Array:
        loss, _ = loss_and_aux(loss_fn(params, batch), has_aux=False)
        return loss.total / loss.weight

    return jax.value_and_grad(mean)(params)


def _shard_map(*, check_vma: bool) -> Callable[..., Result]:
    def mapped(loss_fn: Any, params: Any, batch: Any, **options: Any) -> Result:
        return jax.jit(
            jax.shard_map(
                lambda *args: mean_gradient(loss_fn, *args, axis_name="data", **options),
                mesh=data_mesh(DEVICES),
                in_specs=(P(), P("data")),
                out_specs=(P(), P(), P(), Aux(replicated=P(), rows=P("data")), P()),
                check_vma=check_vma,
            )
        )(params, batch)

    return mapped


def _pmap(loss_fn: Any, params: Any, batch: Any, **options: Any) -> Result:
    return jax.pmap(
        lambda *args: mean_gradient(loss_fn, *args, axis_name="data", **options),
        "data",
        in_axes=(None, 0),
        out_axes=(None, None, None, Aux(replicated=None, rows=0), None),
    )(params, jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch))


def _by_device(loss_fn: Any, params: Any, batch: Any, **options: Any) -> Result:
    mesh = data_mesh(DEVICES)

    def gradient(params: Any, batch: Any) -> Result:
        return mean_gradient_by_device(
            loss_fn, params, batch, mesh=mesh, axis_name="data", **options
        )

    return jax.jit(gradient)(params, batch)


MAPPED = {
    "shard_map": _shard_map(check_vma=True),
    "unchecked": _shard_map(check_vma=False),
    "pmap": _pmap,
    "by_device": _by_device,
}
every_mapping = pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)


@pytest.mark.diagonal
@every_count
@every_loss
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    params: Any, batches: list[Any], loss_fn: Any, micro_batches: int
) -> None:
    result = mean_gradient(loss_fn, params, batches[0], micro_batches=micro_batches)
    loss, weight, gradient, aux, spread = result
    assert_same((loss, gradient), _by_definition(loss_fn, params, batches[0]))
    # A loss that is a mean already has weight 1 in every call.
    expected = micro_batches if loss_fn is mean_loss else batches[0]["weight"].sum()
    assert weight == expected
    assert (aux, spread) == (Aux(None, None), ())


@pytest.mark.diagonal
@every_mapping
@pytest.mark.parametrize("micro_batches", [1, 2])
@every_loss
def test_devices_give_the_gradient_of_the_whole_batch(
    params: Any, batches: list[Any], loss_fn: Any, micro_batches: int, mapped: Any
) -> None:
    loss, weight, gradient, *_ = mapped(loss_fn, params, batches[0], micro_batches=micro_batches)
    assert_same((loss, gradient), _by_definition(loss_fn, params, batches[0]))
    calls = DEVICES * micro_batches
    assert weight == (calls if loss_fn is mean_loss else batches[0]["weight"].sum())


@every_count
def test_devices_and_micro_batches_of_a_larger_batch(
    params: Any, batches: list[Any], micro_batches: int
) -> None:
    """Eight devices with four micro-batches need 32 rows."""
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches[:2])
    expected = mean_gradient(weighted_loss, params, joined)
    actual = MAPPED["shard_map"](weighted_loss, params, joined, micro_batches=micro_batches)
    assert_same(actual, expected)


@every_count
def test_without_weight_loss_and_gradient_are_zero(
    params: Any, batches: list[Any], micro_batches: int
) -> None:
    batch = {**batches[0], "weight": np.zeros(16, np.float32)}
    loss, weight, gradient, *_ = mean_gradient(
        weighted_loss, params, batch, micro_batches=micro_batches
    )
    assert loss == weight == 0
    jax.tree.map(lambda g, x: np.testing.assert_array_equal(g, 0 * x), gradient, params)


@every_mapping
def test_without_weight_on_any_device_loss_and_gradient_are_zero(
    params: Any, batches: list[Any], mapped: Any
) -> None:
    batch = {**batches[0], "weight": np.zeros(16, np.float32)}
    loss, weight, gradient, *_ = mapped(weighted_loss, params, batch)
    assert loss == weight == 0
    jax.tree.map(lambda g, x: np.testing.assert_array_equal(g, 0 * x), gradient, params)


@pytest.mark.diagonal
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mapped", [None, *MAPPED.values()], ids=["one device", *MAPPED])
def test_the_gradient_of_low_precision_parameters_is_wide(
    params: Any, batches: list[Any], mapped: Any, micro_batches: int
) -> None:
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    result = (mapped or mean_gradient)(mean_loss, low, batches[0], micro_batches=micro_batches)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}


def test_micro_batches_are_added_in_float32() -> None:
    """In bfloat16, each of the seven small terms is half an ulp of 1 and would be lost."""
    small = np.full((8, 1), 2.0**-9, np.float32)
    small[0] = 1
    _, _, gradient, *_ = mean_gradient(
        lambda w, x: jnp.sum(w * x.astype("bfloat16")),
        jnp.zeros((), "bfloat16"),
        small,
        micro_batches=8,
    )
    assert gradient == (1 + 7 * 2.0**-9) / 8


def _equations(jaxpr: Any, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every equation of ``jaxpr`` with the names of the primitives that contain it."""
    for equation in jaxpr.eqns:
        yield inside, equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a closed jaxpr, or a jaxpr itself
            if hasattr(inner, "eqns"):
                yield from _equations(inner, (*inside, equation.primitive.name))


@every_mapping
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_sum_over_devices_is_taken_once_in_float32(
    params: Any, batches: list[Any], micro_batches: int, mapped: Any
) -> None:
    """One psum for each gradient, one for the loss and one for the weight; none in the scan."""
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    jaxpr = jax.make_jaxpr(
        lambda *args: mapped(weighted_loss, *args, micro_batches=micro_batches)[:3]
    )(low, batches[0])
    sums = [(inside, e) for inside, e in _equations(jaxpr.jaxpr) if "psum" in e.primitive.name]
    operands = [x.aval for _, equation in sums for x in equation.invars]
    assert [x.dtype for x in operands] == [jnp.dtype("float32")] * len(operands)
    shapes = sorted(x.shape for x in operands)
    assert shapes == sorted([*(x.shape for x in jax.tree.leaves(params)), (), ()])
    assert not any("scan" in inside for inside, _ in sums)
    assert (micro_batches > 1) == any(
        e.primitive.name == "scan" for _, e in _equations(jaxpr.jaxpr)
    )


@pytest.mark.usefixtures("fully_optimized")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_compiler_joins_these_sums_into_one(
    params: Any, batches: list[Any], micro_batches: int
) -> None:
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    gradient = jax.jit(lambda *args: _by_device(weighted_loss, *args, micro_batches=micro_batches))
    text = gradient.lower(low, batches[0]).compile().as_text()
    (line,) = [line for line in text.splitlines() if re.search(r"\ball-reduce(-start)?\(", line)]
    assert "bf16" not in line.split("all-reduce(")[0]
    assert "f32[4,5]" in line
    assert "f32[5,2]" in line


def _loss_with_aux(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return mean_loss(params, batch), {"rows": batch["x"][:, 0], "mean": jnp.mean(batch["y"])}


@pytest.mark.diagonal
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mapped", [None, *MAPPED.values()], ids=["one device", *MAPPED])
def test_aux_is_that_of_the_whole_batch(
    params: Any, batches: list[Any], mapped: Any, micro_batches: int
) -> None:
    batch = batches[0]
    loss, _, gradient, aux, _ = (mapped or mean_gradient)(
        _loss_with_aux, params, batch, micro_batches=micro_batches, has_aux=True
    )
    assert_same((loss, gradient), _by_definition(mean_loss, params, batch))
    rows = aux.rows["rows"].reshape(-1)  # under pmap it has an axis of devices
    np.testing.assert_array_equal(rows, batch["x"][:, 0])
    np.testing.assert_allclose(aux.replicated["mean"], np.mean(batch["y"]), 1e-5)


def test_other_mesh_axes_are_left_to_the_compiler(params: Any, batches: list[Any]) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = NamedSharding(mesh, P(None, "model"))
    placed = {**params, "out": jax.device_put(params["out"], sharded)}

    def gradient(params: Any, batch: Any) -> Result:
        return mean_gradient_by_device(mean_loss, params, batch, mesh=mesh, axis_name="data")

    loss, _, actual, *_ = jax.jit(gradient)(placed, batches[0])
    assert_same((loss, actual), _by_definition(mean_loss, params, batches[0]))
