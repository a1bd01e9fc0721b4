"""Tests arguments that only optax has: harmless values are ignored, others are refused."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import registry
from optim_zoo.errors import ArgumentTypeError

# The optimizers that optax also has, and the pieces whose arguments differ in optax.
NAMES = [
    *(name for name in registry.OPTIMIZERS if hasattr(optax, name)),
    *(name for name in ("scale_by_adam", "scale_by_amsgrad", "scale_by_radam", "scale_by_rms")),
    "scale_by_learning_rate",
    "scale_by_trust_ratio",
    "add_decayed_weights",
]
# For each such argument, a value that would change the result.
CHANGES = {
    "accumulator_dtype": "bfloat16",
    "bias_correction": True,
    "bias_correction_mu": False,
    "bias_correction_nu": False,
    "fast_optimizer": optax.sgd(0.1),
    "flip_sign": False,
    "min_norm": 1.0,
    "mu_dtype": jnp.bfloat16,
    "nesterov": True,
    "reset_state": True,
    "trust_ratio_mask": {"kernel": True, "bias": np.asarray(False)},
    "weight_decay": 0.1,
    "weight_decay_mask": {"kernel": True, "bias": False},
}


def _first(name: str) -> tuple[Any, ...]:
    """Returns the positional arguments that the constructor requires."""
    takes = inspect.signature(getattr(optim_zoo, name)).parameters.values()
    first = next(iter(takes))
    if first.default is not first.empty:
        return ()
    return (optim_zoo.sgd(0.1) if first.name == "inner" else 0.1,)


def _lacking() -> list[Any]:
    return [
        pytest.param(name, parameter, id=f"{name}-{parameter.name}")
        for name in NAMES
        for parameter in inspect.signature(getattr(optax, name)).parameters.values()
        if parameter.name not in inspect.signature(getattr(optim_zoo, name)).parameters
    ]


@pytest.mark.parametrize(("name", "parameter"), _lacking())
def test_an_argument_of_optax_is_ignored_at_its_default_and_refused_otherwise(
    name: str, parameter: inspect.Parameter
) -> None:
    constructor, argument = getattr(optim_zoo, name), parameter.name
    if parameter.default is not parameter.empty and (name, argument) != ("nadam", "nesterov"):
        constructor(*_first(name), **{argument: parameter.default})
    wanted = CHANGES[argument]
    message = rf"^{name} has no argument {argument} \(got .*\): "
    with pytest.raises(ArgumentTypeError, match=message) as caught:
        constructor(*_first(name), **{argument: wanted})
    assert (caught.value.argument, caught.value.received) == (argument, wanted)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("argument", ["mask", "mu_dtype", "eps_root", "nesterov"])
@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_every_optimizer_ignores_values_that_change_nothing(name: str, argument: str) -> None:
    nothing = {"mask": None, "mu_dtype": jnp.float32, "eps_root": 0.0, "nesterov": False}
    entry = registry.OPTIMIZERS[name]
    if entry.wraps:
        assert entry.constructor(optim_zoo.sgd(0.1), 6, **{argument: nothing[argument]})
    else:
        assert entry.constructor(0.1, **{argument: nothing[argument]})


def test_an_argument_that_neither_library_has_raises_pythons_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learing_rate'"):
        optim_zoo.adam(learing_rate=0.1)  # type: ignore[call-arg]
