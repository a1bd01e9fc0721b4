import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import nesterov, sgd
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import nesterov as reference


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.7}])
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: nesterov(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.nesterov(params, grads, learning_rate=schedule, **arguments)
    )


def test_the_one_sequence_form_equals_the_two_sequences_of_sutskever(
    rng: np.random.Generator,
) -> None:
    """Compares with equations 3 and 4 of Sutskever et al. (2013) by x = theta + mu v."""
    root = rng.normal(size=(4, 4))
    curvature = root @ root.T
    mu, rate = 0.9, 0.5 / np.linalg.eigvalsh(curvature)[-1]
    theta, v = rng.normal(size=4), np.zeros(4)
    with jax.enable_x64(True):
        tx = nesterov(rate, mu)
        x = jnp.asarray(theta)
        state = tx.init(x)
        for _ in range(20):
            v = mu * v - rate * curvature @ (theta + mu * v)
            theta = theta + v
            updates, state = tx.update(curvature @ x, state, x)
            x = optax.apply_updates(x, updates)
            # The rounding of 20 float64 steps.
            np.testing.assert_allclose(x, theta + mu * v, rtol=1e-11, atol=1e-13)


def test_nesterov_equals_sgd_with_nesterov(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(lambda: nesterov(schedule, 0.8), params, grads),
        train_in_float64(lambda: sgd(schedule, 0.8, nesterov=True), params, grads),
    )
