"""What the wrappers of this folder share: dtypes narrower than float32, and steps to them."""

from typing import Any

import jax
import jax.numpy as jnp

from optim_zoo.tree import wide

NARROW = ("bfloat16", "float16")


def is_narrow(x: Any) -> bool:
    """Whether ``x`` has a dtype narrower than float32."""
    return jnp.result_type(x).name in NARROW


def reaching(target: jax.Array, x: jax.Array) -> jax.Array:
    """The float32 update that takes ``x`` to ``target``, both of low precision.

    Where they are equal it is what changes nothing: -0.0 + 0.0 would be 0.0, and inf - inf is NaN.
    """
    return jnp.where(target == x, -0.0, wide(target) - wide(x))
