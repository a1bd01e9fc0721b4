import numpy as np
import pytest

from optim_zoo import adagrad
from tests.optimizers.problems import assert_same_path, problem, schedule, train, train_in_float64
from tests.reference import adagrad as reference


@pytest.mark.parametrize(
    "arguments",
    [{}, {"initial_accumulator_value": 0.0, "eps": 1e-3}, {"initial_accumulator_value": 2.0}],
)
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: adagrad(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.adagrad(params, grads, learning_rate=schedule, **arguments)
    )


def test_step_t_under_a_constant_gradient_is_the_learning_rate_over_sqrt_t() -> None:
    """The steps do not depend on the size of the gradient."""
    gradients = [{"x": np.asarray([1e-3, -1.0, 1e3])}] * 20
    trajectory = train_in_float64(
        lambda: adagrad(0.1, 0.0, eps=1e-30), {"x": np.zeros(3)}, gradients
    )
    expected = -0.1 * np.cumsum(1 / np.sqrt(np.arange(1, 21)))
    for x, total in zip(trajectory, expected, strict=True):
        np.testing.assert_allclose(x["x"], total * np.asarray([1, -1, 1]), rtol=1e-12)


def test_a_coordinate_with_rare_gradients_takes_large_steps() -> None:
    gradients = [{"x": np.float32([1.0, 0.0])}] * 99 + [{"x": np.float32([1.0, 1.0])}]
    trajectory = train(adagrad(0.1, 0.0), {"x": np.zeros(2, np.float32)}, gradients)
    assert trajectory[-2]["x"][1] == 0
    # The last of 100 steps is 0.1 / 10, computed as a difference of parameters of size 2.
    moved = trajectory[-1]["x"] - trajectory[-2]["x"]
    np.testing.assert_allclose(moved, [-0.01, -0.1], rtol=1e-4)
