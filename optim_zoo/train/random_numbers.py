"""Random numbers of a run, each a function of the seed and of its purpose.

A resumed run therefore needs no generator state; the step number is enough.
"""

import numpy as np

KEYS = "threefry2x32"  # the implementation of all JAX keys, also where JAX's default differs


def generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """Returns a generator that is independent for every (seed, number, stream).

    It is ``Philox(key=[seed, number], counter=[0, 0, 0, stream])``.

    Args:
      seed: the seed of the run, in [0, 2**64).
      number: such as the number of the batch, in [0, 2**64).
      stream: a constant for each purpose, so that no two purposes share random numbers.

    Raises:
      ValueError: the seed or the number is out of range.
    """
    for name, value in (("seed", seed), ("step", number)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    key = np.array([seed, number], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
