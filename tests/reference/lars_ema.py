"""LARS in float64 NumPy, following Algorithm 1 of arXiv 1904.00962.

Every array is one layer.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def lars_ema(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    weight_decay: float = 0.0,
    phi: Callable[[float], float] = lambda z: z,
    undecayed: Collection[str] = (),
    unadapted: Collection[str] = (),
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            decay = 0.0 if name in undecayed else weight_decay
            m[name] = b1 * m[name] + (1 - b1) * (g + decay * x[name])
            size, step = phi(float(np.sqrt(np.sum(x[name] ** 2)))), np.sqrt(np.sum(m[name] ** 2))
            adapted = name not in unadapted and size > 0 and step > 0
            ratio = size / step if adapted else 1.0
            x[name] = x[name] - learning_rate(t - 1) * ratio * m[name]
        trajectory.append(x)
    return trajectory
