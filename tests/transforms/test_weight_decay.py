import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import add_decayed_weights

PARAMS = {"dense": {"kernel": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray([3.0])}}
UPDATES = {"dense": {"kernel": jnp.asarray([0.5, 0.5]), "bias": jnp.asarray([0.5])}}


def test_excluded_leaves_do_not_decay() -> None:
    tx = add_decayed_weights(0.1, exclude=["bias$"])
    updates, _ = jax.jit(tx.update)(UPDATES, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["dense"]["kernel"], [0.6, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(updates["dense"]["bias"], [0.5])


def test_a_pattern_equals_a_mask_of_optax() -> None:
    ours = add_decayed_weights(0.1, exclude=["bias"])
    mask = {"dense": {"kernel": True, "bias": False}}
    theirs = optax.add_decayed_weights(0.1, mask=mask)
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.update(UPDATES, ours.init(PARAMS), PARAMS)[0],
        theirs.update(UPDATES, theirs.init(PARAMS), PARAMS)[0],
    )


def test_decay_of_low_precision_is_added_in_float32() -> None:
    """In bfloat16, 1 + 0.001 would be 1."""
    tx = add_decayed_weights(1e-3)
    ones = {"x": jnp.ones(2, "bfloat16")}
    updates, _ = tx.update(ones, tx.init(ones), ones)
    np.testing.assert_allclose(updates["x"], 1.001, rtol=1e-6)


def test_invalid_calls_raise() -> None:
    tx = add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="add_decayed_weights needs the parameters"):
        tx.update(UPDATES, tx.init(PARAMS))
    with pytest.raises(ValueError, match="weight_decay must be in"):
        add_decayed_weights(-0.1)
    with pytest.raises(TypeError, match=r"^exclude must be a list"):
        add_decayed_weights(0.1, exclude="bias")
    with pytest.raises(ValueError, match="'norm' matches no leaf; the nearest paths are dense"):
        add_decayed_weights(0.1, exclude=["norm"]).init(PARAMS)
