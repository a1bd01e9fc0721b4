"""`apply_updates` on trees of which some leaves are not trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import adamw, guards, lamb, metrics

PARAMS = {
    "number": 1.5,
    "kernel": jnp.ones((2, 3)),
    "none": None,
    "integers": jnp.arange(3),
    "booleans": np.array([True, False]),
    "whole": 7,
    "key": jax.random.key(0),
}
TRAINED = jax.tree.map(lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating), PARAMS)
Transformation = optax.GradientTransformation
PARTS: dict[str, Callable[[Transformation, Any], Transformation]] = {
    "masked": optax.masked,
    "partition": lambda tx, mask: optax.partition({True: tx, False: optax.set_to_zero()}, mask),
}


def _loss(params: Any) -> jax.Array:
    return 2 * jnp.sum(params["kernel"]) + 3 * params["number"]


def _without_key(tree: Any) -> Any:
    return {name: x for name, x in tree.items() if name != "key"}


def _assert_only_floating_leaves_move(moved: Any, params: Any) -> None:
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for name, x in params.items():
        if name in ("number", "kernel"):
            assert np.all(np.asarray(moved[name]) < np.asarray(x))
            assert jnp.result_type(moved[name]) == jnp.float32
        elif name == "key":
            assert moved[name] is x
        elif x is not None:
            np.testing.assert_array_equal(moved[name], x)
            assert jnp.result_type(moved[name]) == jnp.result_type(x)


@pytest.mark.parametrize("zeros", [False, True], ids=["float0", "zeros"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_leaves_that_are_left_out_of_the_optimizer_stay(part: Any, zeros: bool) -> None:
    """`zeros`: the gradient of integers as some users make it, in their own dtype."""
    params, trained = PARAMS, TRAINED
    gradients = jax.grad(_loss, allow_int=True)(params)
    assert gradients["integers"].dtype == jax.dtypes.float0
    if zeros:
        params, trained, gradients = map(_without_key, (params, trained, gradients))
        gradients = jax.tree.map(
            lambda trained, g, x: g if trained else jnp.zeros_like(x), trained, gradients, params
        )
    tx = part(adamw(0.1), trained)
    updates, _ = tx.update(gradients, tx.init(params), params)
    _assert_only_floating_leaves_move(optim_zoo.apply_updates(params, updates), params)


@pytest.mark.parametrize("wrap", [metrics.with_metrics, guards.skip_spikes])
def test_wrappers_that_take_norms_of_all_leaves(wrap: Any) -> None:
    """The gradient of dtype float0 that integers have adds nothing to a norm."""
    params, trained = _without_key(PARAMS), _without_key(TRAINED)
    tx = wrap(optax.masked(lamb(0.1), trained))
    gradients = jax.grad(_loss, allow_int=True)(params)
    updates, state = tx.update(gradients, tx.init(params), params)
    _assert_only_floating_leaves_move(optim_zoo.apply_updates(params, updates), params)
    if wrap is metrics.with_metrics:
        expected = np.sqrt(6 * 2**2 + 3**2)
        np.testing.assert_allclose(metrics.read(state)["gradient_norm"], expected, rtol=1e-6)


def test_masked_nodes_and_none_stay() -> None:
    masked = optax.MaskedNode()
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": masked, "d": None}
    updates = {"a": jnp.ones(2), "b": masked, "c": masked, "d": None}
    moved = jax.jit(optim_zoo.apply_updates)(params, updates)
    np.testing.assert_array_equal(moved["a"], 2)
    np.testing.assert_array_equal(moved["b"], 1)
    assert moved["c"] == masked
    assert moved["d"] is None


def test_complex_leaves_under_split_real_and_imaginary() -> None:
    """Also next to a real leaf; the update of a complex leaf is complex."""
    params = {"z": jnp.asarray([3.0 + 4.0j, 1.0j]), "x": jnp.ones(2)}
    gradients = {"z": jnp.asarray([1.0 - 1.0j, 2.0 + 0.5j]), "x": jnp.ones(2)}
    tx = optax.contrib.split_real_and_imaginary(adamw(0.1, weight_decay=0.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optim_zoo.apply_updates(params, updates)
    assert moved["z"].dtype == jnp.complex64
    # Adam's first step has the size of the learning rate, separately in both parts.
    np.testing.assert_allclose(moved["z"], [2.9 + 4.1j, -0.1 + 0.9j], rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved["x"], 0.9, rtol=1e-6)


def test_a_complex_update_of_a_real_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="the parameter has dtype complex64"):
        optim_zoo.apply_updates(jnp.ones(2), jnp.ones(2) * 1j)


@pytest.mark.parametrize(
    ("params", "updates"),
    [
        ({"a": jnp.ones(2)}, {"a": {"b": jnp.ones(2)}}),
        ({"a": {"b": jnp.ones(2)}}, {"a": jnp.ones(2)}),
        ([jnp.ones(2)], (jnp.ones(2),)),
        ({"a": jnp.ones(2)}, {"a": None}),
    ],
    ids=["subtree", "leaf", "container", "None"],
)
def test_updates_of_another_structure_are_refused(params: Any, updates: Any) -> None:
    with pytest.raises(ValueError, match="apply_updates: updates must be a tree like the para"):
        optim_zoo.apply_updates(params, updates)


@pytest.mark.parametrize("x", [1.5, np.float32(1.5), np.float64(1.5), np.ones(3, np.float32)])
def test_numbers_and_numpy_arrays_become_arrays_of_their_dtype(x: Any) -> None:
    """As in ``optax.apply_updates``; a number is not weakly typed afterwards."""
    moved = optim_zoo.apply_updates(x, jnp.full(np.shape(x), 0.25, jnp.bfloat16))
    expected = optax.apply_updates(x, jnp.full(np.shape(x), 0.25, jnp.bfloat16))
    np.testing.assert_array_equal(moved, expected)
    assert moved.dtype == expected.dtype == jnp.float32
    assert not moved.weak_type
