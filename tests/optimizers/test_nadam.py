import numpy as np
import pytest

from optim_zoo import adam, nadam
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import nadam as reference


@pytest.mark.parametrize("arguments", [{}, {"b1": 0.7, "b2": 0.8, "eps": 1e-3}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: nadam(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.nadam(params, grads, learning_rate=schedule, **arguments)
    )


def test_nadam_without_momentum_equals_adam(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        *(train_in_float64(lambda f=f: f(schedule, b1=0.0), params, grads) for f in (nadam, adam))
    )


def test_a_new_gradient_has_more_weight_than_in_adam() -> None:
    """When the gradient changes its sign, Nesterov's momentum changes direction sooner."""
    gradients = [{"x": np.asarray([g])} for g in (1.0, 1.0, 1.0, -2.0)]
    nesterov, plain = (
        train_in_float64(lambda f=f: f(0.1), {"x": np.zeros(1)}, gradients) for f in (nadam, adam)
    )
    assert plain[-1]["x"] < plain[-2]["x"]  # still in the old direction
    assert nesterov[-1]["x"] > nesterov[-2]["x"]


def test_nadam_converges_to_adam_under_a_constant_gradient() -> None:
    gradients = [{"x": np.ones(1)}] * 400
    for f in (nadam, adam):
        trajectory = train_in_float64(lambda f=f: f(0.1), {"x": np.zeros(1)}, gradients)
        moved = float(trajectory[-2]["x"][0] - trajectory[-1]["x"][0])
        assert moved == pytest.approx(0.1, rel=1e-6)
