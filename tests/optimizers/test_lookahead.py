from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, lookahead, sgd
from tests.optimizers.problems import (
    Arrays,
    assert_same_path,
    problem,
    schedule,
    train,
    train_in_float64,
)
from tests.reference import lookahead as reference


def _sgd(x: Arrays, g: Arrays, t: int) -> Arrays:
    return {k: x[k] - schedule(t - 1) * g[k] for k in x}


def _adam() -> Callable[[Arrays, Arrays, int], Arrays]:
    """Returns a NumPy step of Adam that keeps its moments at a synchronization."""
    m: Arrays = {}
    v: Arrays = {}

    def step(x: Arrays, g: Arrays, t: int) -> Arrays:
        for k in x:
            m[k] = 0.9 * m.get(k, 0.0) + 0.1 * g[k]
            v[k] = 0.99 * v.get(k, 0.0) + 0.01 * g[k] ** 2
        c1, c2 = 1 - 0.9**t, 1 - 0.99**t
        return {k: x[k] - schedule(t - 1) * m[k] / c1 / (np.sqrt(v[k] / c2) + 1e-3) for k in x}

    return step


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sync_period": 3, "slow_step_size": 0.8},
        {"sync_period": 1, "slow_step_size": 0.3},
        {"sync_period": 4, "slow_step_size": 1.0},
    ],
)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_steps_follow_the_reference(rng: np.random.Generator, base: str, arguments: dict) -> None:
    """Slow weights start at the parameters; fast weights equal them after steps k, 2k, ..."""
    params, grads = problem(rng, steps=13)
    inner = {"sgd": lambda: sgd(schedule), "adam": lambda: adam(schedule, 0.9, 0.99, 1e-3)}[base]
    trajectory = train_in_float64(lambda: lookahead(inner(), **arguments), params, grads)
    expected = reference.lookahead(
        params, grads, inner=_sgd if base == "sgd" else _adam(), **arguments
    )
    assert_same_path(trajectory, expected)


def test_period_1_and_step_size_1_give_the_inner_optimizer(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(lambda: lookahead(adam(schedule), 1, 1.0), params, grads),
        train_in_float64(lambda: adam(schedule), params, grads),
    )


def test_steps_between_synchronizations_are_those_of_the_inner_optimizer(
    rng: np.random.Generator,
) -> None:
    params, grads = problem(rng)
    fast = train_in_float64(lambda: adam(schedule), params, grads)
    trajectory = train_in_float64(lambda: lookahead(adam(schedule), 4, 0.5), params, grads)
    assert_same_path(trajectory[:3], fast[:3])
    halfway = {k: (params[k] + fast[3][k]) / 2 for k in params}
    assert_same_path(trajectory[3:4], [halfway])


def test_lookahead_may_be_the_last_piece_of_a_chain(rng: np.random.Generator) -> None:
    """Pieces in front of Lookahead act like pieces inside it."""
    params, grads = problem(rng)
    outside = train_in_float64(
        lambda: optax.chain(optax.clip(0.1), lookahead(adam(schedule), 3)), params, grads
    )
    inside = train_in_float64(
        lambda: lookahead(optax.chain(optax.clip(0.1), adam(schedule)), 3), params, grads
    )
    assert_same_path(outside, inside)


def test_synchronizations_count_steps_not_micro_batches(rng: np.random.Generator) -> None:
    params, grads = problem(rng, steps=8)
    accumulated = train_in_float64(
        lambda: optax.MultiSteps(
            lookahead(sgd(schedule), 2), every_k_schedule=2
        ).gradient_transformation(),
        params,
        grads,
    )
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    plain = train_in_float64(lambda: lookahead(sgd(schedule), 2), params, means)
    # optax averages the micro-batches with float32 weights.
    assert_same_path(accumulated[1::2], plain, rtol=1e-6, atol=1e-6)
    for between, after in zip(accumulated[::2], [params, *accumulated[1:-1:2]], strict=True):
        jax.tree.map(np.testing.assert_array_equal, between, after)


def test_the_slow_weights_are_a_copy() -> None:
    """Otherwise a donated step would donate one buffer twice or overwrite the parameters."""
    tx = lookahead(sgd(0.1), 2)
    params = {"x": jnp.arange(4.0)}
    state = tx.init(params)

    def step(params: Arrays, state: optax.OptState) -> tuple[Arrays, optax.OptState]:
        updates, state = tx.update({"x": jnp.ones(4)}, state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(4):
        params, state = donated(params, state)
    # Two synchronizations, each of which keeps half of two steps of 0.1.
    np.testing.assert_allclose(params["x"], np.arange(4) - 0.2, rtol=1e-6, atol=1e-6)


def test_the_slow_weights_are_not_rounded_to_bfloat16() -> None:
    """Slow steps that bfloat16 would lose add up in float32 slow weights.

    The gap between bfloat16 numbers below 1 is 2^-8; each step moves the slow weights by 2^-10.
    """
    tx = lookahead(sgd(1.0), 1, 0.125)
    gradients = [{"x": jnp.full(1, 2.0**-7, jnp.float32)}] * 64
    trajectory = train(tx, {"x": jnp.ones(1, jnp.bfloat16)}, gradients)
    assert trajectory[-1]["x"][0] < 1.0


@pytest.mark.parametrize(
    "arguments", [{"sync_period": 0}, {"slow_step_size": -0.1}, {"slow_step_size": 1.5}]
)
def test_arguments_out_of_range_raise(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        lookahead(sgd(0.1), **arguments)


def test_extra_arguments_reach_the_inner_optimizer() -> None:
    tx = lookahead(optax.polyak_sgd(max_learning_rate=10.0), 2)
    params = {"x": jnp.asarray([3.0, 4.0])}
    # The Polyak step size of |x|^2 / 2 is value / |g|^2 = 1/2.
    updates, _ = tx.update(params, tx.init(params), params, value=12.5)
    np.testing.assert_allclose(updates["x"], [-1.5, -2.0], rtol=1e-6)


def test_a_missing_inner_optimizer_or_missing_parameters_raise() -> None:
    params = {"x": jnp.ones(2)}
    tx = lookahead(sgd(0.1))
    with pytest.raises(ValueError, match="lookahead needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="inner must be"):
        lookahead(0.1)  # type: ignore[arg-type]
