import numpy as np
import pytest

from optim_zoo import momentum, sgd
from tests.optimizers.problems import assert_same_path, problem, schedule, train, train_in_float64
from tests.reference import momentum as reference


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.7}, {"momentum": 0.7, "ema": True}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: momentum(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.momentum(params, grads, learning_rate=schedule, **arguments)
    )


def test_the_two_forms_differ_by_a_factor_of_the_learning_rate(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    heavy_ball = train_in_float64(lambda: momentum(schedule, 0.8), params, grads)
    average = train_in_float64(
        lambda: momentum(lambda step: schedule(step) / (1 - 0.8), 0.8, ema=True), params, grads
    )
    assert_same_path(average, heavy_ball)


def test_the_heavy_ball_equals_sgd_with_momentum(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(lambda: momentum(schedule, 0.8), params, grads),
        train_in_float64(lambda: sgd(schedule, 0.8), params, grads),
    )


def test_the_learning_rate_is_applied_after_the_momentum() -> None:
    """A learning rate that drops to 0 stops the parameters at once, whatever the momentum."""
    gradients = [{"x": np.float32([1.0])}] * 4
    tx = momentum(lambda step: 1.0 - (step >= 2))
    trajectory = train(tx, {"x": np.float32([0.0])}, gradients)
    np.testing.assert_allclose([x["x"][0] for x in trajectory], [-1, -2.9, -2.9, -2.9], rtol=1e-6)
