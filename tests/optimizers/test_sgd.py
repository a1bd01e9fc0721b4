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
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: sgd(schedule, **arguments), params, grads)
    assert_same_path(trajectory, reference.sgd(params, grads, learning_rate=schedule, **arguments))


def test_sgd_without_momentum_is_gradient_descent() -> None:
    """On x^2 / 2 each step multiplies x by 1 - learning_rate."""
    x = {"x": jnp.asarray([1.0, -3.0])}
    tx = sgd(0.25)
    state = tx.init(x)
    for t in range(1, 6):
        updates, state = tx.update(x, state, x)
        x = jax.tree.map(jnp.add, x, updates)
        np.testing.assert_allclose(x["x"], 0.75**t * np.asarray([1.0, -3.0]), rtol=1e-6)
        assert all(leaf.shape == () for leaf in jax.tree.leaves(state))  # no momentum is stored


def test_the_first_gradient_is_not_dampened() -> None:
    """As in torch, dampening = momentum makes constant steps from a constant gradient."""
    gradients = [{"x": np.float32([2.0])}] * 5
    trajectory = train(sgd(0.5, 0.9, dampening=0.9), {"x": np.float32([0.0])}, gradients)
    np.testing.assert_allclose(
        np.concatenate([x["x"] for x in trajectory]), [-1, -2, -3, -4, -5], rtol=1e-6
    )


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_with_dampening_or_without_momentum_raises(arguments: dict) -> None:
    with pytest.raises(ValueError, match="nesterov"):
        sgd(0.1, nesterov=True, **arguments)
