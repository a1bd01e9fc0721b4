"""AdaDelta in float64 NumPy, following Algorithm 1 of arXiv 1212.5701.

The learning rate, which the paper does not have, does not enter the average of the updates.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def adadelta(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    rho: float = 0.9,
    eps: float = 1e-6,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    s = {name: np.zeros_like(value) for name, value in x.items()}  # E[g^2]
    d = {name: np.zeros_like(value) for name, value in x.items()}  # E[dx^2]
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            s[name] = rho * s[name] + (1 - rho) * g**2
            u = np.sqrt(d[name] + eps) / np.sqrt(s[name] + eps) * g
            d[name] = rho * d[name] + (1 - rho) * u**2
            x[name] = x[name] - learning_rate(t - 1) * u
        trajectory.append(x)
    return trajectory
