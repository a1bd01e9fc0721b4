"""Checksums that detect a changed bit in an array."""

import jax
import jax.numpy as jnp

from optim_zoo import saved_state
from optim_zoo.tree import Tree


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns the sum modulo 2^32 of an array's words, each hashed with its index: () uint32.

    The hash is invertible, so that every change of a single word is detected. Any other change is
    missed with probability 2^-32. The sum does not depend on the sharding of the array.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, unsigned)
    words = x.astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    words += index * jnp.uint32(0x9E3779B9)  # any odd number
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the final step of MurmurHash3
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def checksums(tree: Tree) -> dict[str, int]:
    """Returns the checksum of every array, keyed by its path in `saved_state.describe`."""
    # One program at a time: on a CPU with few cores, concurrent programs whose devices wait for one
    # another may run out of threads and deadlock.
    sums = [int(checksum(x)) for x in jax.tree.leaves(tree)]
    return dict(zip(saved_state.describe(tree)["arrays"], sums, strict=True))
