"""RMSprop (Tieleman and Hinton, lecture 6.5, 2012) in float64 NumPy.

The centered form follows equations 38 to 45 of arXiv 1308.0850, which apply the learning rate
inside the momentum.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def rmsprop(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    decay: float = 0.9,
    eps: float = 1e-8,
    eps_in_sqrt: bool = True,
    initial_scale: float = 0.0,
    centered: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    n = {name: np.full_like(value, initial_scale) for name, value in x.items()}
    a = {name: np.zeros_like(value) for name, value in x.items()}
    b = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            n[name] = decay * n[name] + (1 - decay) * g**2
            a[name] = decay * a[name] + (1 - decay) * g
            variance = n[name] - a[name] ** 2 if centered else n[name]
            root = np.sqrt(variance + eps) if eps_in_sqrt else np.sqrt(variance) + eps
            step = learning_rate(t - 1) * g / root
            b[name] = momentum * b[name] + step
            x[name] = x[name] - (momentum * b[name] + step if nesterov else b[name])
        trajectory.append(x)
    return trajectory
