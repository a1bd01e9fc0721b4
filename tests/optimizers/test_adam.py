import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, adamw, add_decayed_weights
from tests.optimizers.problems import assert_same_path, problem, schedule, train, train_in_float64
from tests.reference import adam as reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"b1": 0.7, "b2": 0.8, "eps": 1e-3},
        {"b1": 0.0, "b2": 0.0, "eps": 1e-3},
        {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "bias_correction": False},
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: adam(schedule, **arguments), params, grads)
    assert_same_path(trajectory, reference.adam(params, grads, learning_rate=schedule, **arguments))


def test_the_first_step_is_the_learning_rate_times_the_sign() -> None:
    gradients = [{"x": jnp.asarray([1e-4, -1.0, 1e4, 0.0])}]
    (x,) = train(adam(0.1), {"x": jnp.zeros(4)}, gradients)
    # eps is 1e-4 times the smallest nonzero gradient.
    np.testing.assert_allclose(x["x"], [-0.1, 0.1, -0.1, 0.0], rtol=2e-4)


def test_steps_do_not_depend_on_the_scale_of_the_gradient(rng: np.random.Generator) -> None:
    """Quotes the paper: updates are "invariant to rescaling of the gradient"."""
    params, grads = problem(rng)
    for g in grads:
        g["still"] = np.ones_like(g["still"])  # with eps = 0, a zero gradient gives 0 / 0
    scaled = [{k: 1234.5 * g[k] for k in g} for g in grads]
    assert_same_path(
        train_in_float64(lambda: adam(schedule, eps=0.0), params, scaled),
        train_in_float64(lambda: adam(schedule, eps=0.0), params, grads),
    )


def test_decay_before_adam_is_l2_regularization(rng: np.random.Generator) -> None:
    """The decay enters the moments, unlike that of `adamw`."""
    params, grads = problem(rng)
    l2 = train_in_float64(
        lambda: optax.chain(add_decayed_weights(0.3), adam(schedule)), params, grads
    )
    assert_same_path(l2, reference.adam(params, grads, learning_rate=schedule, l2=0.3))
    decoupled = train_in_float64(lambda: adamw(schedule, weight_decay=0.3), params, grads)
    for name in ("kernel", "bias", "scale", "conv"):
        assert np.abs(l2[-1][name] - decoupled[-1][name]).max() > 1e-3
