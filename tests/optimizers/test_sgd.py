import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import sgd
from tests.optimizers.problems import assert_same_path, problem, schedule, train, train_in_float64
from tests.reference import sgd as reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.8},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
    ],
)
def test_the_algorithm(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: sgd(schedule, **arguments), params, grads)
    assert_same_path(trajectory, reference.sgd(params, grads, learning_rate=schedule, **arguments))


def test_without_momentum_it_is_gradient_descent() -> None:
    """x^2 / 2 shrinks by 1 - learning_rate a step."""
    x = {"x": jnp.asarray([1.0, -3.0])}
    tx = sgd(0.25)
    state = tx.init(x)
    for t in range(1, 6):
        updates, state = tx.update(x, state, x)
        x = jax.tree.map(jnp.add, x, updates)
        np.testing.assert_allclose(x["x"], 0.75**t * np.asarray([1.0, -3.0]), rtol=1e-6)
        assert all(leaf.shape == () for leaf in jax.tree.leaves(state))  # no momentum is stored


def test_the_first_gradient_is_not_dampened() -> None:
    """By the rule of torch, dampening = momentum turns a constant gradient into a constant step."""
    gradients = [{"x": np.float32([2.0])}] * 5
    trajectory = train(sgd(0.5, 0.9, dampening=0.9), {"x": np.float32([0.0])}, gradients)
    np.testing.assert_allclose(
        np.concatenate([x["x"] for x in trajectory]), [-1, -2, -3, -4, -5], rtol=1e-6
    )


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(arguments: dict) -> None:
    with pytest.raises(ValueError, match="nesterov"):
        sgd(0.1, nesterov=True, **arguments)
