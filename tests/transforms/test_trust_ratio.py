import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import scale_by_trust_ratio, split, stacked
from optim_zoo.transforms import ScaleByTrustRatioState

X = {"a": jnp.asarray([3.0, 4.0]), "b": {"c": jnp.full((2, 2), 10.0)}}  # norms 5, 20
U = {"a": jnp.asarray([0.0, 2.0]), "b": {"c": jnp.full((2, 2), 0.25)}}  # norms 2, 0.5


def _scaled(
    tx: optax.GradientTransformation, updates: optax.Updates = U, params: optax.Params = X
) -> tuple[optax.Updates, ScaleByTrustRatioState]:
    return jax.jit(tx.update)(updates, tx.init(params), params)


def test_each_update_gets_the_norm_of_its_parameter() -> None:
    updates, state = _scaled(scale_by_trust_ratio())
    np.testing.assert_allclose(updates["a"], [0, 5], rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["c"], 10.0, rtol=1e-6)
    assert state == ScaleByTrustRatioState(
        trust_ratio={"a": 2.5, "b/c": 40},
        parameter_norm={"a": 5, "b/c": 20},
        update_norm={"a": 2, "b/c": 0.5},
    )


def test_trust_ratios_agree_with_optax(rng: np.random.Generator) -> None:
    params = {"a": jnp.asarray(rng.normal(size=(7, 5)), "float32"), "b": jnp.zeros(3)}
    updates = {"a": jnp.asarray(rng.normal(size=(7, 5)), "float32"), "b": jnp.ones(3)}
    theirs = optax.scale_by_trust_ratio(trust_coefficient=0.1, eps=1e-3)
    expected, _ = theirs.update(updates, theirs.init(params), params)
    ours, _ = _scaled(scale_by_trust_ratio(trust_coefficient=0.1, eps=1e-3), updates, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"phi_bounds": (None, 10.0)}, {"a": 5 / 2, "b/c": 10 / 0.5}),
        ({"phi_bounds": (6.0, None)}, {"a": 6 / 2, "b/c": 20 / 0.5}),
        ({"phi_bounds": (6.0, 10.0)}, {"a": 6 / 2, "b/c": 10 / 0.5}),
        ({"ratio_bounds": (3.0, 10.0)}, {"a": 3, "b/c": 10}),
        ({"trust_coefficient": 0.01}, {"a": 0.01 * 5 / 2, "b/c": 0.01 * 20 / 0.5}),
        ({"eps": 0.5}, {"a": 5 / 2.5, "b/c": 20 / 1}),
        ({"trust_coefficient": 0.01, "ratio_bounds": (None, 0.1)}, {"a": 0.025, "b/c": 0.1}),
    ],
)
def test_trust_ratios_follow_the_formula(arguments: dict, expected: dict[str, float]) -> None:
    updates, state = _scaled(scale_by_trust_ratio(**arguments))
    assert {k: float(x) for k, x in state.trust_ratio.items()} == pytest.approx(expected)
    np.testing.assert_allclose(updates["a"], expected["a"] * U["a"], rtol=1e-6)


def test_a_zero_layer_has_ratio_1_whatever_the_bounds_and_the_coefficient() -> None:
    tx = scale_by_trust_ratio(trust_coefficient=0.1, ratio_bounds=(5.0, 6.0), eps=1.0)
    params = {"x": jnp.zeros(2), "u": jnp.ones(2), "both": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    updates = {"x": jnp.ones(2), "u": jnp.zeros(2), "both": jnp.zeros(2), "none": jnp.ones((0, 3))}
    scaled, state = _scaled(tx, updates, params)
    jax.tree.map(np.testing.assert_array_equal, scaled, updates)
    assert all(ratio == 1 for ratio in state.trust_ratio.values())


def test_phi_raises_the_norm_of_a_zero_parameter() -> None:
    """By the formula phi(0) is the lower bound, so the fallback for a zero norm is not used."""
    _, state = _scaled(
        scale_by_trust_ratio(phi_bounds=(1.0, 2.0)), {"x": jnp.ones(4)}, {"x": jnp.zeros(4)}
    )
    assert state.trust_ratio["x"] == 0.5


def test_a_gradient_flows_through_a_zero_layer() -> None:
    """The branch of the ratio that is not taken must not make the derivative NaN."""
    tx = scale_by_trust_ratio()
    zeros = {"x": jnp.zeros(2)}

    def moved(rate: jax.Array) -> jax.Array:
        updates, _ = tx.update({"x": rate * jnp.ones(2)}, tx.init(zeros), zeros)
        return updates["x"].sum()

    assert jax.grad(moved)(1.0) == 2


def test_excluded_leaves_are_unchanged_and_not_in_the_state() -> None:
    tx = scale_by_trust_ratio(exclude=["^a$"])
    state = tx.init(X)
    updates, after = tx.update(U, state, X)
    assert updates["a"] is U["a"]
    assert list(after.trust_ratio) == list(state.trust_ratio) == ["b/c"]
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_each_layer_has_a_separate_ratio() -> None:
    params = {"x": jnp.asarray([[1.0, 1.0], [100.0, 100.0]]).repeat(2, axis=1)}
    updates = {"x": jnp.ones((2, 4))}
    tx = scale_by_trust_ratio(layers=[("x", (stacked(0), split(1, 2)))])
    assert tx.init(params).trust_ratio["x"].shape == (4,)
    scaled, state = _scaled(tx, updates, params)
    np.testing.assert_allclose(state.trust_ratio["x"], [1, 1, 100, 100], rtol=1e-6)
    np.testing.assert_allclose(state.parameter_norm["x"], np.sqrt([2, 2, 2e4, 2e4]), rtol=1e-6)
    np.testing.assert_allclose(scaled["x"], params["x"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_half_precision_are_float32(dtype: str) -> None:
    """The square of 300 would overflow in float16, whose largest number is 65,504."""
    half = {"x": jnp.full(10_000, 300.0, dtype)}
    scaled, state = _scaled(scale_by_trust_ratio(), half, half)
    np.testing.assert_allclose(state.parameter_norm["x"], 300.0 * 100, rtol=1e-3)
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(state))
    np.testing.assert_allclose(scaled["x"], half["x"].astype("float32"), rtol=1e-5)


def test_invalid_calls_raise() -> None:
    tx = scale_by_trust_ratio()
    with pytest.raises(ValueError, match="scale_by_trust_ratio needs the parameters"):
        tx.update(U, tx.init(X))
    with pytest.raises(ValueError, match=r"trust_coefficient must be in \(0, inf\)"):
        scale_by_trust_ratio(trust_coefficient=0.0)
    with pytest.raises(ValueError, match="phi_bounds must have low <= high"):
        scale_by_trust_ratio(phi_bounds=(2.0, 1.0))
    with pytest.raises(TypeError, match="ratio_bounds must be a pair"):
        scale_by_trust_ratio(ratio_bounds=10.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers: the value of 'x' must be stacked"):
        scale_by_trust_ratio(layers=[("x", 0)])
    with pytest.raises(ValueError, match="several leaves have the path b/c"):
        tx.init({"b/c": jnp.ones(1), **X})
