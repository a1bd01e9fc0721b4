"""Momentum in float64 NumPy: Polyak's heavy ball (1964), or a moving average of the gradients."""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def momentum(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    momentum: float = 0.9,
    ema: bool = False,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    b = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            b[name] = momentum * b[name] + ((1 - momentum) * g if ema else g)
            x[name] = x[name] - learning_rate(t - 1) * b[name]
        trajectory.append(x)
    return trajectory
