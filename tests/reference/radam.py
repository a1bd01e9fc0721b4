"""RAdam in float64 NumPy, following Algorithm 2 of arXiv 1908.03265.

The paper rectifies if rho > 4 and has no eps. Here the threshold is an argument, and eps is added
to the corrected square root.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def radam(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    threshold: float = 5.0,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    rho_inf = 2 / (1 - b2) - 1
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        for name in x:
            g = g_t[name].astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            u = m[name] / (1 - b1**t)
            if rho >= threshold:
                rectified = (rho - 4) * (rho - 2) * rho_inf
                r = np.sqrt(rectified / ((rho_inf - 4) * (rho_inf - 2) * rho))
                u = r * u / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            x[name] = x[name] - learning_rate(t - 1) * u
        trajectory.append(x)
    return trajectory
