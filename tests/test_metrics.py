import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optim_zoo import adamw, clip_by_global_norm, lamb, metrics, stacked

PARAMS = {"stack": jnp.ones((2, 3)), "head": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}}
GRADS = jax.tree.map(lambda x: 2 * x, PARAMS)


def test_everything_of_the_step_just_made() -> None:
    tx = optax.chain(
        clip_by_global_norm(1.0),
        lamb(
            lambda step: 0.5 / (step + 1),
            exclude_from_layer_adaptation=["bias"],
            layers=[("stack", stacked(0))],
        ),
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    names = ("trust_ratio", "parameter_norm", "update_norm")
    leaves = ("stack", "head/kernel")
    assert set(read) == {"learning_rate", "gradient_norm"} | {
        f"{name}/{leaf}" for name in names for leaf in leaves
    }
    assert read["learning_rate"] == 0.5
    np.testing.assert_allclose(read["gradient_norm"], 2 * np.sqrt(6 + 16 + 2), rtol=1e-6)
    np.testing.assert_allclose(read["parameter_norm/stack"], np.sqrt([3, 3]), rtol=1e-6)
    np.testing.assert_allclose(read["update_norm/head/kernel"], 2, rtol=1e-5)  # signs
    for leaf in leaves:
        ratio = read[f"parameter_norm/{leaf}"] / read[f"update_norm/{leaf}"]
        np.testing.assert_allclose(read[f"trust_ratio/{leaf}"], ratio, rtol=1e-6)


def test_only_what_the_pieces_kept() -> None:
    assert set(metrics.read(adamw(0.1).init(PARAMS))) == {"learning_rate"}
    assert metrics.read(optax.adamw(0.1).init(PARAMS)) == {}
    assert set(metrics.read(lamb(0.1).init({}))) == {"learning_rate"}


def test_the_keys_are_fixed_and_traced_state_can_be_read() -> None:
    tx = lamb(0.1)

    @jax.jit
    def step(state: optax.OptState) -> tuple[optax.OptState, dict[str, jax.Array]]:
        _, state = tx.update(GRADS, state, PARAMS)
        return state, metrics.read(state)

    state = tx.init(PARAMS)
    before = metrics.read(state)
    state, read = step(state)
    assert jax.tree.structure(read) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, read, metrics.read(state))


def test_below_other_wrappers() -> None:
    tx = optax.apply_if_finite(
        optax.partition({"a": lamb(0.1), "b": optax.sgd(1.0)}, {"stack": "a", "head": "b"}), 3
    )
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert set(metrics.read(state)) == {
        "learning_rate", "trust_ratio/stack", "parameter_norm/stack", "update_norm/stack"
    }  # fmt: skip


def test_the_state_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lamb(0.1), wrt=nnx.Param)
    read = metrics.read(optimizer.opt_state)
    assert {key for key in read if key.startswith("trust_ratio")} == {
        "trust_ratio/bias",
        "trust_ratio/kernel",
    }
    for value in read.values():
        assert isinstance(value, jax.Array)
        assert value.shape == ()


def test_two_rates_are_an_error() -> None:
    """Rather than one of them, without a word."""
    tx = optax.partition({"a": lamb(0.1), "b": adamw(1e-4)}, {"x": "a", "y": "b"})
    state = tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match="several values of learning_rate"):
        metrics.read(state)
