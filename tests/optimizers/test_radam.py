import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, momentum, radam
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import radam as reference


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"b1": 0.7, "b2": 0.9, "eps": 1e-3},
        {"b1": 0.7, "b2": 0.9, "eps": 1e-3, "threshold": 6.5},
        {"b1": 0.7, "threshold": 4.5},
        {"b2": 0.5},  # rho stays below 3, so no step is rectified
    ],
)
def test_steps_follow_the_reference(rng: np.random.Generator, arguments: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: radam(schedule, **arguments), params, grads)
    assert_same_path(
        trajectory, reference.radam(params, grads, learning_rate=schedule, **arguments)
    )


def test_radam_converges_to_adam(rng: np.random.Generator) -> None:
    """With b2 = 0.9 and t = 400, 2 t b2^t is 4e-16 and the rectification is 1."""
    grads = [{"x": rng.normal(size=3)} for _ in range(400)]
    params = {"x": np.zeros(3)}
    rectified, plain = (
        train_in_float64(lambda f=f: f(0.1, b2=0.9), params, grads) for f in (radam, adam)
    )
    for trajectory in (rectified, plain):
        assert np.abs(trajectory[-1]["x"]).max() < 100  # so that differences have 14 digits
    # Parameters of size 100 are subtracted, and c2 is 1 within 1e-14.
    np.testing.assert_allclose(
        rectified[-1]["x"] - rectified[-2]["x"], plain[-1]["x"] - plain[-2]["x"], atol=1e-12
    )
    assert np.abs(rectified[9]["x"] - plain[9]["x"]).max() > 0.1


def test_steps_below_the_threshold_are_momentum_with_bias_correction(
    rng: np.random.Generator,
) -> None:
    """The first five steps with the default b2 are the "un-adapted momentum" of the paper."""
    params, grads = problem(rng)
    rates = [0.1 / (1 - 0.8 ** (t + 1)) for t in range(10)]
    trajectory = train_in_float64(lambda: radam(0.1, b1=0.8), params, grads)
    plain = train_in_float64(
        lambda: momentum(lambda step: jnp.asarray(rates)[step], 0.8, ema=True), params, grads
    )
    assert_same_path(trajectory[:5], plain[:5])
    assert np.abs(trajectory[5]["scale"] - plain[5]["scale"]) > 1.0


def _rectification(b2: float, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rho_t and r_t of the paper in float64; r_t is NaN where it is not real."""
    t = steps.astype(np.float64)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    rectified = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return rho, np.sqrt(np.where(rho > 4, rectified, np.nan))


def _step_sizes(b2: float, steps: np.ndarray, threshold: float = 5.0) -> np.ndarray:
    """Returns the size of step t for each t of ``steps``, in float32 with gradient 1.

    The moments are zero before each step. With b1 = 0, a step that is not rectified has size 1,
    and a rectified one r_t / sqrt(nu_hat).
    """
    tx = radam(1.0, b1=0.0, b2=b2, eps=0.0, threshold=threshold)
    params = {"x": jnp.zeros(())}
    state = tx.init(params)

    @jax.jit
    @jax.vmap
    def step(count: jax.Array) -> jax.Array:
        at_count = optax.tree.set(state, count=count)
        return -tx.update({"x": jnp.ones(())}, at_count, params)[0]["x"]

    sizes = step(jnp.asarray(steps - 1, jnp.int32))
    assert sizes.dtype == jnp.float32
    return np.asarray(sizes, np.float64)


@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("threshold", [5.0, 6.0, 7.0])
def test_the_first_rectified_step_is_the_same_in_float32_and_float64(
    b2: float, threshold: float
) -> None:
    """rho is a small difference of large numbers: rho_5 = 4.9996 of two numbers near 2e4.

    With b2 = 0.999, the formula of the paper gives rho_6 = 6.0005 in float32 instead of 5.9942.
    """
    steps = np.arange(1, 20)
    rho, _ = _rectification(b2, steps)
    if threshold == 5.0:
        assert rho[4] < 5 < rho[5]
    np.testing.assert_array_equal(_step_sizes(b2, steps, threshold) != 1.0, rho >= threshold)


@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999])
def test_the_float32_rectification_agrees_with_float64(b2: float) -> None:
    steps = np.unique(np.geomspace(6, 1e6, 20000).astype(int))
    _, r = _rectification(b2, steps)
    nu_hat = (1 - b2) / (1 - b2 ** steps.astype(np.float64))
    np.testing.assert_allclose(_step_sizes(b2, steps) * np.sqrt(nu_hat), r, rtol=1e-5)
