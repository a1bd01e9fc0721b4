"""What optax users expect of any optimizer, tested for every optimizer of the registry."""

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

Make = Callable[..., optax.GradientTransformation]  # its first argument is the learning rate

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, 0.5)}
GRADS = {"kernel": jnp.full((3, 2), 0.3), "bias": jnp.full(2, -0.2)}


def _as_function_of_the_rate(entry: registry.Entry) -> Make:
    """Returns the constructor, with a transformation to wrap where it needs one."""
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
    """Under `inject_hyperparams` all numbers are arrays, also those left at their defaults."""
    init = optax.inject_hyperparams(MAKE[name])(learning_rate=0.1).init
    expected = _types(MAKE[name](0.1).init(PARAMS))
    assert _types(init(PARAMS).inner_state) == expected
    assert _types(jax.eval_shape(init, PARAMS).inner_state) == expected


@pytest.mark.parametrize("value", [0.0, 0.9])
@pytest.mark.parametrize("name", [name for name in MAKE if "momentum" in _takes(name)])
def test_a_momentum_is_kept_for_every_number(name: str, value: float) -> None:
    if name == "nesterov" and value == 0.0:
        pytest.skip("a range of its own excludes 0")
    known = MAKE[name](0.1, momentum=value).init(PARAMS)
    traced = jax.eval_shape(lambda m: MAKE[name](0.1, momentum=m).init(PARAMS), value)
    assert _types(known) == _types(traced)
    assert optax.tree.get(known, "momentum") is not None


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_no_momentum_is_kept_by_default(name: str) -> None:
    sizes = [x.size for x in jax.tree.leaves(MAKE[name](0.1).init(PARAMS))]
    averages = 1 if name == "rmsprop" else 0
    assert sum(sizes) == 2 + 8 * averages  # the step and the rate; 8 parameters


@pytest.mark.parametrize(
    "port", [ports.torch.SGD, ports.torch.RMSprop, ports.keras.RMSprop, ports.tf1.RMSPropOptimizer]
)
def test_a_port_keeps_no_momentum_where_its_source_has_0(port: Make) -> None:
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
