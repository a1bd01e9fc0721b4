"""Stochastic gradient descent with momentum in float64 NumPy, following torch.optim.SGD.

Dampening starts with the second gradient.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def sgd(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    b: Arrays = {}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            if t == 1:
                b[name] = g
            else:
                b[name] = momentum * b[name] + (1 - dampening) * g
            if momentum == 0:
                u = g
            elif nesterov:
                u = g + momentum * b[name]
            else:
                u = b[name]
            x[name] = x[name] - learning_rate(t - 1) * u
        trajectory.append(x)
    return trajectory
