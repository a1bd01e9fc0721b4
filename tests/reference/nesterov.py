"""Nesterov's momentum in float64 NumPy, in the one-sequence form of arXiv 1212.0901, section 3.5.

The parameters are the points at which the gradients are taken.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def nesterov(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    momentum: float = 0.9,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    b = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            b[name] = momentum * b[name] + g
            x[name] = x[name] - learning_rate(t - 1) * (g + momentum * b[name])
        trajectory.append(x)
    return trajectory
