from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adamw, lamb, lookahead, momentum, sgd
from optim_zoo.wrappers.guards import skip_nonfinite
from optim_zoo.wrappers.precision import (
    master_weights,
    round_stochastically,
    stochastic_rounding,
    store_state,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

low_precision = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def _steps(tx: optax.GradientTransformation, params: Any, gradients: Any, count: int) -> Any:
    """Makes ``count`` steps in a scan, which requires that the state keeps its types."""

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, count)[0])(carry)


@low_precision
def test_master_weights_end_where_float32_training_ends(dtype: str) -> None:
    """A step of 1e-3 is less than half the gap between bfloat16 numbers at 1, and would be lost."""
    gradients = {"x": jnp.array([1.0, -1.0, 0.5])}
    start = {"x": jnp.ones(3)}
    low = jax.tree.map(lambda x: x.astype(dtype), (start, gradients))
    expected, _ = _steps(adamw(1e-3), start, gradients, 1000)
    trained, state = _steps(master_weights(adamw(1e-3)), *low, 1000)
    assert trained["x"].dtype == dtype
    np.testing.assert_array_equal(trained["x"], expected["x"].astype(dtype))
    np.testing.assert_allclose(state.master["x"], expected["x"], rtol=1e-6, atol=1e-7)
    if dtype == "bfloat16":
        alone, _ = _steps(adamw(1e-3), *low, 1000)
        assert float(jnp.abs(alone["x"][0] - 1)) < 0.01  # unchanged without master weights


@low_precision
def test_optax_apply_updates_gives_the_rounded_master_weights(
    dtype: str, rng: np.random.Generator
) -> None:
    """The result is exact if |new| >= 2^-16 |old| (float16: 2^-13), else within 2^-24 |old|."""
    old = jnp.asarray(rng.normal(size=20_000), dtype)
    least = {"bfloat16": 16, "float16": 13}[dtype]
    # New numbers range from the size of the old ones to far below the bound.
    scale = 2.0 ** -rng.uniform(0, 2 * least if dtype == "bfloat16" else 14, size=old.shape)
    target = jnp.asarray(np.float32(old) * scale * rng.choice([-1, 1], old.shape), "float32")
    tx = master_weights(optax.stateless(lambda updates, _: updates))
    updates, state = tx.update(target - old.astype("float32"), tx.init(old), old)
    assert updates.dtype == "float32"
    landed = np.float64(optax.apply_updates(old, updates))
    rounded = np.float64(state.master.astype(dtype))
    exact = np.abs(rounded) >= 2.0**-least * np.abs(np.float64(old))
    assert 0.3 < exact.mean() < 1
    np.testing.assert_array_equal(landed[exact], rounded[exact])
    assert (np.abs(landed - rounded) <= 2.0**-24 * np.abs(np.float64(old)))[~exact].all()


def test_the_next_step_corrects_the_rounding() -> None:
    old = jnp.asarray([1.0], "bfloat16")
    tx = master_weights(optax.stateless(lambda updates, _: updates))
    updates, state = tx.update(jnp.asarray([1.23e-7 - 1.0]), tx.init(old), old)
    there = optax.apply_updates(old, updates)
    updates, state = tx.update(jnp.zeros(1), state, there)
    again = optax.apply_updates(there, updates)
    np.testing.assert_array_equal(again, state.master.astype("bfloat16"))


def test_only_low_precision_parameters_have_master_weights(rng: np.random.Generator) -> None:
    params = {"low": jnp.ones((2, 3), "bfloat16"), "norm": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), params)
    tx = master_weights(lamb(0.1, weight_decay=0.1))
    state = tx.init(params)
    assert isinstance(state.master["norm"], optax.MaskedNode)
    assert state.master["low"].dtype == "float32"
    trained, _ = _steps(tx, params, gradients, 3)
    wide = jax.tree.map(lambda x: x.astype("float32"), params)
    expected, _ = _steps(lamb(0.1, weight_decay=0.1), wide, gradients, 3)
    np.testing.assert_allclose(trained["norm"], expected["norm"], rtol=1e-6)
    np.testing.assert_array_equal(trained["low"], expected["low"].astype("bfloat16"))


def test_lookahead_inside_master_weights_equals_float32() -> None:
    params, gradients = jnp.ones(4, "bfloat16"), jnp.full(4, 0.3)
    trained, _ = _steps(master_weights(lookahead(sgd(1e-3), 2)), params, gradients, 9)
    expected, _ = _steps(lookahead(sgd(1e-3), 2), jnp.ones(4), gradients, 9)
    np.testing.assert_array_equal(trained, expected.astype("bfloat16"))


@low_precision
def test_stochastic_rounding_is_unbiased(dtype: str, rng: np.random.Generator) -> None:
    """The mean over 4,000 keys has a standard error of at most gap / (2 sqrt(keys))."""
    x = jnp.asarray(
        np.concatenate([rng.normal(size=50), 2.0 ** rng.uniform(-12, 12, 50)]), "float32"
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.jit(jax.vmap(lambda k: round_stochastically(x, jnp.dtype(dtype), k)))(keys)
    assert rounded.dtype == dtype
    distinct = [np.unique(np.float64(column)) for column in np.asarray(rounded).T]
    assert max(map(len, distinct)) == 2
    for value, numbers in zip(np.float64(x), distinct, strict=True):
        assert numbers.min() <= value <= numbers.max()
    gap = np.array([numbers.max() - numbers.min() for numbers in distinct])
    mean = np.float64(rounded).mean(0)
    # Five standard errors: exceeded by chance once in two million times.
    assert (np.abs(mean - np.float64(x)) <= 5 * gap / 2 / np.sqrt(len(keys))).all()
    nearest = np.float64(x.astype(dtype))
    assert np.abs(nearest - np.float64(x)).max() > 5 * gap.max() / 2 / np.sqrt(len(keys))


@low_precision
def test_numbers_that_the_narrow_dtype_holds_are_unchanged(dtype: str) -> None:
    exact = jnp.asarray([0.0, 1.0, -2.5, 2**-10, jnp.inf, -jnp.inf, jnp.nan], "float32")
    for key in jax.random.split(jax.random.key(1), 20):
        rounded = round_stochastically(exact, jnp.dtype(dtype), key)
        np.testing.assert_array_equal(np.float32(rounded), exact)


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """Makes 500 steps of 1e-3 from 1, each below half the gap between bfloat16 numbers."""
    params, gradients = jnp.ones(2000, "bfloat16"), jnp.ones(2000)
    trained, state = _steps(
        stochastic_rounding(sgd(1e-3), jax.random.key(0)), params, gradients, 500
    )
    assert trained.dtype == "bfloat16"
    mean = np.float64(trained).mean()
    # Five standard errors of the mean of 2,000 random walks of 500 roundings by 2^-8.
    np.testing.assert_allclose(mean, 0.5, atol=5 * 2**-8 / 2 * np.sqrt(500 / 2000))
    assert not jnp.array_equal(
        jax.random.key_data(state.key), jax.random.key_data(jax.random.key(0))
    )
    again, _ = _steps(stochastic_rounding(sgd(1e-3), jax.random.key(0)), params, gradients, 500)
    np.testing.assert_array_equal(trained, again)
    still, _ = _steps(sgd(1e-3), params, gradients, 500)
    np.testing.assert_array_equal(still, params)  # round to nearest loses every step


def test_float32_parameters_are_not_rounded(rng: np.random.Generator) -> None:
    params = jnp.asarray(rng.normal(size=5), "float32")
    expected, _ = _steps(adamw(0.1), params, params, 3)
    for wrap in (master_weights, lambda tx: stochastic_rounding(tx, jax.random.key(0))):
        np.testing.assert_allclose(
            _steps(wrap(adamw(0.1)), params, params, 3)[0], expected, rtol=1e-6
        )


def test_store_state_stores_bfloat16_and_computes_in_float32() -> None:
    params = {"x": jnp.ones(1000)}
    tx = store_state(adamw(1e-2), {"mu": "bfloat16", "nu": "bfloat16"})
    state = tx.init(params)
    adam = optax.tree.get(state, "ScaleByAdamState")
    assert (adam.mu["x"].dtype, adam.nu["x"].dtype, adam.count.dtype) == (
        "bfloat16", "bfloat16", "int32"
    )  # fmt: skip
    trained, _ = _steps(tx, params, {"x": jnp.full(1000, 0.1)}, 100)
    expected, _ = _steps(adamw(1e-2), params, {"x": jnp.full(1000, 0.1)}, 100)
    # A first moment stalls when 0.1 times the remaining difference is half a gap: 2^-9 / 0.1.
    np.testing.assert_allclose(1 - trained["x"].mean(), 1 - expected["x"].mean(), rtol=2**-9 / 0.1)


def test_a_second_moment_in_bfloat16_does_not_stall() -> None:
    """With a decay rate of 0.999, round to nearest would stall at about half the value."""
    params = {"x": jnp.ones(2000)}
    gradients = {"x": jnp.ones(2000)}
    tx = store_state(adamw(1e-3), {"nu": "bfloat16"})
    _, state = _steps(tx, params, gradients, 3000)
    reached = np.float64(optax.tree.get(state, "ScaleByAdamState").nu["x"]).mean()
    expected = 1 - 0.999**3000
    np.testing.assert_allclose(reached, expected, rtol=5e-3)

    def nearest(nu: jax.Array, _: None) -> tuple[jax.Array, None]:
        return (0.999 * nu.astype("float32") + 0.001).astype("bfloat16"), None

    stalled, _ = jax.lax.scan(nearest, jnp.zeros((), "bfloat16"), None, 3000)
    assert stalled < 0.6


def test_precision_wrappers_can_be_nested() -> None:
    params = {"x": jnp.ones(8, "bfloat16")}
    tx = master_weights(store_state(momentum(1e-3), {"momentum": "float16"}))
    trained, state = _steps(tx, params, {"x": jnp.ones(8, "bfloat16")}, 50)
    expected, _ = _steps(momentum(1e-3), {"x": jnp.ones(8)}, {"x": jnp.ones(8)}, 50)
    # bfloat16 parameters have 8 significant bits, the float16 momentum has 11.
    np.testing.assert_allclose(np.float32(trained["x"]), expected["x"], rtol=2**-7)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "float16", "int32"}


@low_precision
@pytest.mark.parametrize(
    "wrap", [master_weights, lambda tx: stochastic_rounding(tx, jax.random.key(0))]
)
def test_a_skipped_step_changes_no_bit(dtype: str, wrap: Any) -> None:
    """Adding 0.0 would change -0.0, and inf - inf would give NaN."""
    params = jnp.asarray([-0.0, 0.0, 1.0, jnp.inf], dtype)
    tx = wrap(skip_nonfinite(sgd(0.1)))
    updates, _ = jax.jit(tx.update)(jnp.full(4, jnp.nan), tx.init(params), params)
    assert optax.apply_updates(params, updates).tobytes() == params.tobytes()


def test_only_floating_point_arrays_are_stored_in_low_precision() -> None:
    params = {"x": jnp.ones(3, "bfloat16")}
    tx = store_state(
        stochastic_rounding(skip_nonfinite(adamw(0.1)), jax.random.key(0)), {"inner": "bfloat16"}
    )
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    dtypes = [x.dtype for x in jax.tree.leaves(state)]
    assert [x.dtype for x in jax.tree.leaves(after)] == dtypes
    assert dtypes.count("bfloat16") == 3  # both moments and the learning rate
    for name in ("count", "key"):
        with pytest.raises(ValueError, match=f"unknown field of the state '{name}'"):
            narrow = store_state(
                stochastic_rounding(adamw(0.1), jax.random.key(0)), {name: "bfloat16"}
            )
            narrow.init(params)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(TypeError, match=r"key must be one key, such as jax.random.key\(0\)"):
        stochastic_rounding(sgd(0.1), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown dtype for nu 'float16'"):
        store_state(adamw(0.1), {"nu": "float16"})
    with pytest.raises(ValueError, match="unknown field of the state 'momentum'"):
        store_state(adamw(0.1), {"momentum": "bfloat16"}).init({"x": jnp.ones(2)})
    for tx in (master_weights(sgd(0.1)), stochastic_rounding(sgd(0.1), jax.random.key(0))):
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        with pytest.raises(TypeError, match="parameters must be floating-point"):
            tx.init({"x": jnp.ones(2, "int32")})
