"""Arguments of optax's optimizers that ours do not have, or spell in another way.

`accepts_optax_arguments` lets a constructor ignore such an argument if its value changes nothing,
such as ``mu_dtype=None``. Otherwise it raises an error that names the spelling of this library.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo.errors import ArgumentTypeError

P = ParamSpec("P")
T = TypeVar("T")

_STORE = (
    "moments are float32 or wider; optim_zoo.precision.store_state(inner, {{'{field}': "
    "'bfloat16'}}) stores them in fewer bits"
)
_DECAY = "pass path patterns of the leaves that are not decayed as exclude_from_weight_decay"
_NO_DECAY = (
    "it has no weight decay; put optim_zoo.add_decayed_weights(weight_decay, mask=...) in a chain"
)
_BOTH_MOMENTS = "bias_correction applies to both moments"

# Advice that is the same for every constructor.
_ADVICE: Mapping[str, str] = {
    "accumulator_dtype": _STORE.format(field="momentum"),
    "bias_correction": "optim_zoo.adam(learning_rate, b1=0.0, b2=decay) is RMSprop with it",
    "bias_correction_mu": _BOTH_MOMENTS,
    "bias_correction_nu": _BOTH_MOMENTS,
    "eps_root": "it adds eps in one place only",
    "fast_optimizer": "pass the optimizer as inner",
    "flip_sign": "put optax.scale(-1.0) behind it in a chain",
    "min_norm": "pass the bounds of the parameter norm as phi_bounds=(min_norm, None)",
    "mu_dtype": _STORE.format(field="mu"),
    "nesterov": "optim_zoo.nadam is Adam with Nesterov's momentum, optim_zoo.nesterov without Adam",
    "reset_state": "the state of inner is kept when the weights are synchronized",
    "trust_ratio_mask": (
        "pass path patterns of the leaves with a trust ratio of 1 as exclude_from_layer_adaptation"
    ),
    "weight_decay": _NO_DECAY,
}
_MASKS = ("mask", "weight_decay_mask")


def accepts_optax_arguments(constructor: Callable[P, T]) -> Callable[P, T]:
    """Decorates a constructor, which then recognizes the arguments of its namesake in optax.

    An argument of optax that the constructor lacks is ignored if its value changes nothing.

    Args:
      constructor: A function that makes an optimizer or a piece.

    Returns:
      A function with the same signature and docstring. A call raises `ArgumentTypeError` where the
      value of such an argument would change something; the message names what to write instead.
      An argument that neither library has raises Python's ``TypeError``.
    """
    own = inspect.signature(constructor).parameters
    name = constructor.__name__

    @functools.wraps(constructor)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for argument in [key for key in kwargs if key not in own]:
            if advice := _advice(argument, own):
                value = kwargs.pop(argument)
                if not _changes_nothing(argument, value):
                    raise _unknown(name, argument, value, advice)
        return constructor(*args, **kwargs)

    return wrapped


def _advice(argument: str, own: Mapping[str, Any]) -> str | None:
    if argument in _MASKS:
        return _DECAY if "exclude_from_weight_decay" in own else _NO_DECAY
    return _ADVICE.get(argument)


def _changes_nothing(argument: str, value: Any) -> bool:
    """Returns whether a constructor without the argument behaves as with this value of it."""
    match argument:
        case "mu_dtype" | "accumulator_dtype":
            return value is None or jnp.dtype(value) == jnp.float32
        case "mask" | "weight_decay_mask" | "trust_ratio_mask":
            return value is None or value is True
        case "flip_sign" | "bias_correction_mu" | "bias_correction_nu":
            return value is True
        case "nesterov" | "reset_state" | "bias_correction":
            return value is False
        case "eps_root" | "min_norm" | "weight_decay":
            return value is None or (isinstance(value, (int, float, np.number)) and value == 0)
        case _:
            return False


def _unknown(name: str, argument: str, value: Any, advice: str) -> ArgumentTypeError:
    arrays = any(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in jax.tree.leaves(value))
    shown = type(value).__name__ if arrays else repr(value)
    return ArgumentTypeError(
        argument,
        f"be an argument of {name}",
        value,
        advice,
        sentence=f"{name} has no argument {{argument}} (got {shown[:60]}): {advice}",
        caller=name,
    )
