from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import sharding
from optim_zoo.errors import ArgumentError
from optim_zoo.sharding import WeightedLoss
from optim_zoo.sharding.losses import loss_and_aux
from tests.sharding.problem import data_mesh, mean_loss, weighted_loss

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("quick_to_compile")]

every_mode = pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])


def test_a_weighted_loss_is_a_pair() -> None:
    total, weight = loss = WeightedLoss(jnp.float32(6), jnp.float32(2))
    assert (total, weight) == (loss.total, loss.weight) == (6, 2)


@pytest.mark.parametrize(
    ("value", "has_aux", "expected"),
    [
        (3, False, ((3, 1), None)),
        (np.float16(3), False, ((3, 1), None)),
        (WeightedLoss(6, 2), False, ((6, 2), None)),
        ((3, "aux"), True, ((3, 1), "aux")),
        ([WeightedLoss(6, 2), (4, 5)], True, ((6, 2), (4, 5))),
    ],
)
def test_the_loss_and_its_weight_are_scalars_of_the_float_dtype(
    value: Any, has_aux: bool, expected: Any
) -> None:
    loss, aux = loss_and_aux(value, has_aux)
    assert (loss, aux) == expected
    assert loss.total.dtype == loss.weight.dtype == jnp.float32


BOTH_REMEDIES = r"sharding\.WeightedLoss\(total, weight\) for a sum .* pass has_aux=True"


@pytest.mark.parametrize(
    ("value", "has_aux", "error", "message"),
    [
        ((6.0, 2.0), False, TypeError, f"got a tuple of 2: return {BOTH_REMEDIES}"),
        ([6.0, 2.0], False, TypeError, f"got a list of 2: return {BOTH_REMEDIES}"),
        ((6.0, {"accuracy": 1.0}), False, TypeError, BOTH_REMEDIES),
        ({"loss": 3.0}, False, TypeError, f"got dict: return {BOTH_REMEDIES}"),
        (None, False, TypeError, "got NoneType"),
        (((6.0, 2.0), {}), True, TypeError, f"got a tuple of 2: return {BOTH_REMEDIES}"),
        (WeightedLoss(6.0, 2.0), True, TypeError, r"must return a pair \(loss, aux\) .* Weighted"),
        (3.0, True, TypeError, r"must return a pair \(loss, aux\) with has_aux=True, .* got float"),
        ((3.0, {}, {}), True, TypeError, r"must return a pair \(loss, aux\) .* got a tuple of 3"),
        (np.ones(2), False, ValueError, r"the mean loss, a scalar, .* an array of shape \(2,\)"),
        (WeightedLoss(6.0, np.ones(2)), False, ValueError, r"an array of shape \(2,\)"),
        ((np.ones(2), {}), True, ValueError, r"an array of shape \(2,\)"),
    ],
)
def test_what_is_no_loss(value: Any, has_aux: bool, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        loss_and_aux(value, has_aux)
    assert isinstance(caught.value, ArgumentError)
    assert caught.value.argument == "loss_fn"


@every_mode
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("pair", [tuple, list])
def test_a_metric_is_not_taken_for_a_weight(
    params: Any, batches: list[Any], mode: str, micro_batches: int, pair: Any
) -> None:
    """An accuracy of 0.25 as the weight would make the loss and the step four times too large."""
    step = sharding.data_parallel(
        lambda params, batch: pair([mean_loss(params, batch), jnp.float32(0.25)]),
        optax.sgd(0.1),
        mesh=data_mesh(2),
        mode=mode,
        micro_batches=micro_batches,
    )
    with pytest.raises(TypeError, match=f"loss_fn must return the mean loss.* {BOTH_REMEDIES}"):
        step(*step.init(params), batches[0])


@every_mode
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_weighted_loss_with_aux(
    params: Any, batches: list[Any], mode: str, micro_batches: int
) -> None:
    def loss_fn(params: Any, batch: Any) -> Any:
        return weighted_loss(params, batch), {"rows": batch["weight"]}

    step = sharding.data_parallel(
        loss_fn,
        optax.sgd(0.1),
        mesh=data_mesh(2),
        mode=mode,
        micro_batches=micro_batches,
        has_aux=True,
    )
    _, _, loss, _ = step(*step.init(params), batches[0])
    total, weight = jax.jit(weighted_loss)(params, batches[0])
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)  # sums in another order
