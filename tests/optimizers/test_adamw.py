import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, adamw
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import adamw as reference

SHAPES = {"kernel": (5, 3), "bias": (3,)}


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"bias_correction": False, "eps": 1e-6}, {"bias_correction": False, "eps": 1e-6}),
        (
            {"b1": 0.0, "b2": 0.5, "weight_decay": 1.0, "exclude_from_weight_decay": ["bias"]},
            {"b1": 0.0, "b2": 0.5, "weight_decay": 1.0, "undecayed": ("bias",)},
        ),
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    params = {k: np.float32(rng.normal(size=s)) for k, s in SHAPES.items()}
    grads = [{k: np.float32(rng.normal(size=s)) for k, s in SHAPES.items()} for _ in range(12)]
    tx = adamw(lambda step: 0.01 * step, **ours)
    expected = reference.adamw(params, grads, learning_rate=lambda s: 0.01 * s, **papers)
    x = jax.tree.map(jnp.asarray, params)
    state = tx.init(x)
    update = jax.jit(tx.update)
    for g, y in zip(grads, expected, strict=True):
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
        for name in SHAPES:
            # Twelve float32 steps of up to 0.1, each with a relative error of a few times 1e-7.
            np.testing.assert_allclose(x[name], y[name], rtol=2e-6, atol=2e-7)


def test_the_decay_is_decoupled() -> None:
    """Without a gradient, each step multiplies the parameters by 1 - learning_rate weight_decay."""
    tx = adamw(0.1, weight_decay=0.5)
    params = {"x": jnp.asarray([1.0, -20.0])}
    updates, _ = tx.update({"x": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["x"], -0.05 * params["x"], rtol=1e-6)


def test_adamw_without_decay_equals_adam(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(lambda: adamw(schedule, 0.7, 0.8, 1e-3, weight_decay=0.0), params, grads),
        train_in_float64(lambda: adam(schedule, 0.7, 0.8, 1e-3), params, grads),
    )


def test_float64_steps_follow_the_reference(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    arguments = {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3}
    assert_same_path(
        train_in_float64(lambda: adamw(schedule, **arguments), params, grads),
        reference.adamw(params, grads, learning_rate=schedule, **arguments),
    )
