import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import scale_by_adam
from optim_zoo.transforms import adam


def _directions(tx: optax.GradientTransformation, grads: np.ndarray) -> np.ndarray:
    state = tx.init({"x": jnp.asarray(grads[0])})
    update = jax.jit(tx.update)
    directions = []
    for g in grads:
        updates, state = update({"x": jnp.asarray(g)}, state)
        directions.append(updates["x"])
    return np.asarray(directions)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_directions_follow_the_formula(rng: np.random.Generator, bias_correction: bool) -> None:
    grads = rng.normal(size=(10, 5)).astype(np.float32)
    b1, b2, eps = 0.9, 0.999, 1e-6
    mu = nu = np.zeros(5)
    expected = []
    for t, g in enumerate(grads.astype(np.float64), 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1, 1)
        expected.append((mu / c1) / (np.sqrt(nu / c2) + eps))
    ours = _directions(scale_by_adam(b1, b2, eps, bias_correction=bias_correction), grads)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-6)


def test_the_first_direction_is_the_sign_of_the_gradient(rng: np.random.Generator) -> None:
    grads = rng.normal(size=(1, 100)).astype(np.float32)
    ours = _directions(scale_by_adam(eps=0.0), grads)
    # Three roundings. If 1 - b2^t were computed in float32, the error would be 3e-5.
    np.testing.assert_allclose(ours, np.sign(grads), rtol=3e-7)


def test_directions_agree_with_optax(rng: np.random.Generator) -> None:
    grads = rng.normal(size=(10, 5)).astype(np.float32)
    # optax computes 1 - b2^t with an error of 3e-5, and half of that after the square root.
    np.testing.assert_allclose(
        _directions(scale_by_adam(), grads), _directions(optax.scale_by_adam(), grads), rtol=2e-5
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_the_bias_correction_is_accurate_for_all_steps(decay: float) -> None:
    steps = np.asarray([1, 2, 10, 1000, 10**6])
    expected = -np.expm1(steps * np.log(decay)) if decay else np.ones(5)
    np.testing.assert_allclose(adam.bias(decay, jnp.asarray(steps)), expected, rtol=3e-7)
    # A traced rate is rounded to float32 first, which changes 1 - decay by 3e-8 / (1 - decay).
    traced = jax.jit(adam.bias)(decay, jnp.asarray(steps))
    np.testing.assert_allclose(traced, expected, rtol=6e-8 / (1 - decay) + 3e-7)


def test_a_second_moment_does_not_stall_in_bfloat16() -> None:
    """With a bfloat16 state, 0.999 nu + 0.001 g^2 would round back to nu."""
    grads = np.ones((300, 1), np.float32)
    tx = scale_by_adam(0.0, bias_correction=False)
    params = {"x": jnp.ones(1, "bfloat16")}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in grads:
        _, state = update({"x": jnp.ones(1, "bfloat16")}, state)
    np.testing.assert_allclose(state.nu["x"], 1 - 0.999**300, rtol=1e-4)


def test_the_count_saturates() -> None:
    tx = scale_by_adam()
    params = {"x": jnp.ones(2)}
    state = tx.init(params)._replace(count=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    updates, state = tx.update(params, state)
    assert state.count == np.iinfo(np.int32).max
    assert np.isfinite(updates["x"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": 1.2}, r"b2 must be in \[0, 1\), got 1.2"),
        ({"eps": -1e-8}, r"eps must be in \[0, inf\)"),
    ],
)
def test_arguments_out_of_range_raise(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_by_adam(**arguments)


def test_rates_rounded_to_bfloat16_are_refused() -> None:
    """optax.inject_hyperparams rounds b2 = 0.999 to 1 if all parameters are bfloat16."""
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(TypeError, match="hyperparam_dtype"):
        jax.jit(optax.inject_hyperparams(scale_by_adam)().init)(params)
    tx = optax.inject_hyperparams(scale_by_adam, hyperparam_dtype=jnp.float32)()
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["x"], 1.0, rtol=1e-6)  # the first step is the sign


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="parameters must be floating-point, x has dtype complex64"):
        scale_by_adam().init({"x": jnp.ones(2, jnp.complex64)})
