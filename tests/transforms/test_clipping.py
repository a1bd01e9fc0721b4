import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optim_zoo import clip_by_global_norm

GRADS = {"a": jnp.asarray([3.0, 0.0]), "b": {"c": jnp.asarray([[0.0], [4.0]])}}  # norm 5


def _clip(max_norm: float, grads: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    tx = clip_by_global_norm(max_norm)
    clipped, state = jax.jit(tx.update)(grads, tx.init(grads))
    return clipped, state.gradient_norm


@pytest.mark.parametrize("max_norm", [1.0, 4.99])
def test_a_large_gradient_is_scaled_to_max_norm(max_norm: float) -> None:
    clipped, norm = _clip(max_norm, GRADS)
    assert norm == 5
    np.testing.assert_allclose(clipped["a"], [0.6 * max_norm, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], [[0], [0.8 * max_norm]], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [5.0, 6.0, np.inf])
def test_a_small_gradient_is_unchanged(max_norm: float) -> None:
    clipped, norm = _clip(max_norm, GRADS)
    assert norm == 5
    jax.tree.map(np.testing.assert_array_equal, clipped, GRADS)


def test_a_zero_gradient_and_an_empty_tree_are_unchanged() -> None:
    clipped, norm = _clip(1.0, {"a": jnp.zeros(3)})
    assert norm == 0
    np.testing.assert_array_equal(clipped["a"], jnp.zeros(3))
    assert _clip(1.0, {}) == ({}, 0)


def test_squares_of_half_precision_are_summed_in_float32() -> None:
    """The square of 300 would overflow in float16."""
    clipped, norm = _clip(1.0, {"a": jnp.full(4, 300.0, "float16")})
    assert (norm, norm.dtype) == (600, jnp.float32)
    np.testing.assert_allclose(clipped["a"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad: float) -> None:
    """As in tf.clip_by_global_norm, no leaf looks clipped and none passes unclipped."""
    clipped, norm = _clip(1.0, {"a": jnp.full(2, bad), "b": jnp.full(3, 100.0)})
    assert not np.isfinite(norm)
    assert not np.isfinite(clipped["a"]).any()
    assert not (np.abs(clipped["b"]) > 1).any()


def test_clipping_agrees_with_optax(rng: np.random.Generator) -> None:
    grads = {"a": jnp.asarray(rng.normal(size=(7, 5)), "float32"), "b": jnp.ones(3)}
    expected, _ = optax.clip_by_global_norm(0.7).update(grads, optax.EmptyState())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), _clip(0.7, grads)[0], expected
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_norm_of_sharded_gradients_is_global(check_vma: bool) -> None:
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = jnp.arange(8.0), jnp.ones(3)
    tx = clip_by_global_norm(1.0, axis_name=None if check_vma else [("sharded", "model")])

    def clipped(grads: optax.Updates) -> tuple[optax.Updates, jax.Array]:
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.gradient_norm

    specs = {"sharded": P("model"), "replicated": P()}
    mapped = jax.shard_map(
        clipped, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()), check_vma=check_vma
    )
    grads = {"sharded": sharded, "replicated": replicated}
    updates, norm = jax.jit(mapped)(grads)
    expected, expected_norm = _clip(1.0, grads)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)


def test_invalid_arguments_raise() -> None:
    for max_norm in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"max_norm must be in \(0, inf\]"):
            clip_by_global_norm(max_norm)
    with pytest.raises(TypeError, match="axis_name must be a list of pairs"):
        clip_by_global_norm(1.0, axis_name=3)
    with pytest.raises(ValueError, match="axis_name: 'absent' matches no leaf"):
        clip_by_global_norm(1.0, axis_name=[("absent", "data")]).init(GRADS)
