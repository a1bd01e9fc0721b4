"""Tests that every optimizer of the registry follows the conventions of optax."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import adam, ports, registry, scale_by_adam

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Make = Callable[..., optax.GradientTransformation]  # the first argument is the learning rate

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, 0.5)}
GRADS = {"kernel": jnp.linspace(-0.3, 0.7, 6).reshape(3, 2), "bias": jnp.full(2, -0.2)}


def _as_function_of_the_rate(entry: registry.Entry) -> Make:
    """Returns the constructor; a wrapper is applied to Adam first."""
    if not entry.wraps:
        return entry.constructor
    if "learning_rate" in inspect.signature(entry.constructor).parameters:
        return functools.partial(entry.constructor, scale_by_adam())
    return lambda learning_rate: entry.constructor(adam(learning_rate))


MAKE = {name: _as_function_of_the_rate(entry) for name, entry in registry.OPTIMIZERS.items()}
every = pytest.mark.parametrize("name", MAKE)


def _takes(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(registry.OPTIMIZERS[name].constructor).parameters)


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# The structure of the state does not depend on tracing.


@every
def test_injected_hyperparameters_add_no_state(name: str) -> None:
    """Under `inject_hyperparams` all numbers are arrays, including the defaults."""
    init = optax.inject_hyperparams(MAKE[name])(learning_rate=0.1).init
    expected = _types(MAKE[name](0.1).init(PARAMS))
    assert _types(init(PARAMS).inner_state) == expected
    assert _types(jax.eval_shape(init, PARAMS).inner_state) == expected


@pytest.mark.parametrize("value", [0.0, 0.9])
@pytest.mark.parametrize("name", [name for name in MAKE if "momentum" in _takes(name)])
def test_the_state_has_a_momentum_for_every_number_passed(name: str, value: float) -> None:
    if name == "nesterov" and value == 0.0:
        pytest.skip("nesterov does not accept a momentum of 0")
    known = MAKE[name](0.1, momentum=value).init(PARAMS)
    traced = jax.eval_shape(lambda m: MAKE[name](0.1, momentum=m).init(PARAMS), value)
    assert _types(known) == _types(traced)
    assert optax.tree.get(known, "momentum") is not None


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_the_state_has_no_momentum_by_default(name: str) -> None:
    sizes = [x.size for x in jax.tree.leaves(MAKE[name](0.1).init(PARAMS))]
    averages = 1 if name == "rmsprop" else 0
    assert sum(sizes) == 2 + 8 * averages  # step and learning rate; 8 parameters


@pytest.mark.parametrize(
    "port", [ports.torch.SGD, ports.torch.RMSprop, ports.keras.RMSprop, ports.tf1.RMSPropOptimizer]
)
def test_the_state_of_a_port_has_no_momentum_if_it_is_0(port: Make) -> None:
    state = port(0.1, momentum=0).init(PARAMS)
    assert optax.tree.get(state, "momentum") is None
    assert optax.tree.get(port(0.1, momentum=0.5).init(PARAMS), "momentum") is not None


# Values of a state are found by their name.


@every
def test_the_count_and_the_injected_rate_are_found_by_name(name: str) -> None:
    """`optax.tree.get` raises where a name occurs twice. Some optimizers count no steps."""
    tx = MAKE[name](0.1)
    state = tx.update(GRADS, tx.init(PARAMS), PARAMS)[1]
    assert optax.tree.get(state, "count") in (None, 1)
    assert optax.tree.get(state, "learning_rate") is None
    assert optax.tree.get(state, "step") == 1
    assert optax.tree.get(state, "rate") == np.float32(0.1)
    injected = optax.inject_hyperparams(MAKE[name])(learning_rate=0.5).init(PARAMS)
    assert optax.tree.get(injected, "learning_rate") == 0.5
    changed = optax.tree.set(injected, learning_rate=jnp.float32(0.25))
    assert changed.hyperparams["learning_rate"] == 0.25


# Arguments of optax.


def _run(make: Make, **options: Any) -> Any:
    """Returns the parameters after seven float64 steps; RAdam rectifies from step 6 on."""
    with jax.enable_x64(True):
        params, grads = (jax.tree.map(lambda x: np.float64(x), t) for t in (PARAMS, GRADS))
        tx = make(0.1, **options)
        state = tx.init(params)
        for _ in range(7):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(np.asarray, params)


def _assert_close(x: Any, y: Any) -> None:
    # optax loses 4 of 16 digits of 1 - b2^t in the first steps; we use expm1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11), x, y)


@pytest.mark.parametrize("name", [name for name in MAKE if "eps_root" in _takes(name)])
def test_eps_root_agrees_with_optax(name: str) -> None:
    """The gradient is constant, because optax takes AMSGrad's maximum of corrected moments."""
    ours = _run(MAKE[name], eps_root=0.01)
    _assert_close(ours, _run(getattr(optax, name), eps_root=0.01))
    assert not np.allclose(ours["kernel"], _run(MAKE[name])["kernel"], rtol=1e-3)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_nesterov_of_adam_agrees_with_optax(name: str) -> None:
    _assert_close(_run(MAKE[name], nesterov=True), _run(getattr(optax, name), nesterov=True))
    with pytest.raises(ValueError, match=r"^nesterov must be False without bias_correction"):
        MAKE[name](0.1, nesterov=True, bias_correction=False)


MASKS = {
    "tree": {"kernel": True, "bias": False},
    "numpy": {"kernel": np.bool_(True), "bias": np.bool_(False)},
    "function": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}
MASKED = [name for name in MAKE if "mask" in _takes(name)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_and_a_pattern_exclude_the_same_leaves(name: str, mask: Any) -> None:
    make = functools.partial(MAKE[name], weight_decay=0.3)
    masked, by_pattern = make(0.1, mask=mask), make(0.1, exclude_from_weight_decay=["bias"])
    assert jax.tree.structure(masked.init(PARAMS)) == jax.tree.structure(by_pattern.init(PARAMS))
    results = _run(make, mask=mask), _run(make, exclude_from_weight_decay=["bias"])
    jax.tree.map(np.testing.assert_array_equal, *results)
    both = _run(make, mask=mask, exclude_from_weight_decay=["kernel"])
    jax.tree.map(np.testing.assert_array_equal, both, _run(MAKE[name], weight_decay=0.0))


@pytest.mark.parametrize("name", MASKED)
def test_init_refuses_a_mask_that_does_not_fit(name: str) -> None:
    wrong = [({"kernel": True}, ValueError), ({"kernel": True, "bias": 1.0}, TypeError)]
    for mask, error in wrong:
        tx = MAKE[name](0.1, weight_decay=0.3, mask=mask)
        with pytest.raises(error, match=r"^mask must be a tree of bools like the parameters"):
            tx.init(PARAMS)


# Gradients through an update, and `init` on shapes.


@every
def test_derivatives_of_updates_are_finite_at_zero_gradients(name: str) -> None:
    """The square root has no derivative at 0; that of `tree.root` is defined as 0."""

    def loss(grads: Any, learning_rate: Any) -> jax.Array:
        tx = MAKE[name](learning_rate)
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    grads = {**GRADS, "bias": jnp.zeros(2)}
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(grads, 0.1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert found[1] != 0  # the derivative with respect to the learning rate


@every
def test_init_accepts_shape_dtype_structs(name: str) -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    tx = MAKE[name](0.1)
    assert _types(tx.init(shapes)) == _types(jax.eval_shape(tx.init, PARAMS))
