"""Checksums of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optim_zoo.train.checksums import checksum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_a_checksum_depends_on_every_bit_but_not_on_the_sharding(dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, (8, 6)).astype(jnp.dtype(dtype))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    seen = [int(checksum(x))]
    assert int(checksum(placed)) == seen[0]
    for position in [(0, 0), (3, 5), (7, 5)]:
        for bit in range(1 if dtype == "bool" else x.dtype.itemsize * 8):
            other = x.copy()
            bits = other.view(f"uint{x.dtype.itemsize * 8}")
            bits[position] ^= bits.dtype.type(1 << bit)
            seen.append(int(checksum(other)))
    seen.append(int(checksum(x[::-1])))
    assert len(set(seen)) == len(seen)
