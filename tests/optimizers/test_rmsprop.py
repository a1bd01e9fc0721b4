import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import adam, rmsprop
from tests.optimizers.problems import assert_same_path, problem, schedule, train, train_in_float64
from tests.reference import rmsprop as reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"decay": 0.7, "eps": 1e-3},
        {"decay": 0.7, "eps": 1e-3, "eps_in_sqrt": False},
        {"decay": 0.7, "eps": 1e-3, "centered": True},
        {"decay": 0.7, "eps": 1e-3, "centered": True, "eps_in_sqrt": False},
        {"initial_scale": 1.0, "momentum": 0.6},
        {"initial_scale": 1.0, "momentum": 0.6, "centered": True, "nesterov": True},
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: rmsprop(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.rmsprop(params, grads, learning_rate=schedule, **arguments)
    )


def test_rmsprop_with_eps_outside_the_root_equals_uncorrected_adam_without_b1(
    rng: np.random.Generator,
) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(lambda: rmsprop(schedule, 0.8, 1e-3, eps_in_sqrt=False), params, grads),
        train_in_float64(
            lambda: adam(schedule, 0.0, 0.8, 1e-3, bias_correction=False), params, grads
        ),
    )


def test_the_learning_rate_is_inside_the_momentum() -> None:
    """After the learning rate drops to 0, the momentum decays: steps of 1, 0.5, 0.25."""
    gradients = [{"x": jnp.ones(1)}] * 3
    tx = rmsprop(lambda step: 1.0 * (step == 0), decay=0.0, momentum=0.5)
    trajectory = train(tx, {"x": jnp.zeros(1)}, gradients)
    np.testing.assert_allclose([x["x"][0] for x in trajectory], [-1, -1.5, -1.75], rtol=1e-6)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1234.5])
def test_centered_rmsprop_makes_no_nan_under_a_constant_gradient(
    size: float, eps_in_sqrt: bool
) -> None:
    """The variance converges to 0, and float32 rounding would make it negative."""
    gradients = [{"x": jnp.asarray([size, 0.7 * size, 1.3 * size])}] * 200
    tx = rmsprop(1e-3, 0.9, eps_in_sqrt=eps_in_sqrt, centered=True)
    trajectory = train(tx, {"x": jnp.zeros(3)}, gradients)
    assert all(np.isfinite(x["x"]).all() for x in trajectory)


def test_nesterov_without_momentum_raises() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        rmsprop(0.1, nesterov=True)
