"""Dtypes narrower than float32, and conversions from and to them."""

from typing import Any

import jax
import jax.numpy as jnp

from optim_zoo.tree import wide

NARROW = ("bfloat16", "float16")


def is_narrow(x: Any) -> bool:
    """Returns whether ``x`` has a dtype narrower than float32."""
    return jnp.result_type(x).name in NARROW


def widened(x: Any) -> Any:
    """Returns ``x`` in float32, or unchanged if its dtype is wider.

    A ``jax.ShapeDtypeStruct``, which has no numbers to convert, becomes another one.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.promote_types(x.dtype, jnp.float32))
    return wide(x)


def reaching(target: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the float32 update that takes ``x`` to ``target``, both in low precision.

    Where they are equal, the update is -0.0: adding 0.0 would turn -0.0 into 0.0, and the
    difference of two infinities is NaN.
    """
    return jnp.where(target == x, -0.0, wide(target) - wide(x))
