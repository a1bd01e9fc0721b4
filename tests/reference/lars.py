"""LARS in float64 NumPy, following arXiv 1708.03888 and its code in tensorflow/tpu.

Every array is one layer. The paper's Algorithm 1 has the learning rate inside the momentum.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def lars(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    nesterov: bool = False,
    lr_inside_momentum: bool = True,
    undecayed: Collection[str] = (),
    unadapted: Collection[str] = (),
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    b = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            decay = 0.0 if name in undecayed else weight_decay
            size, slope = np.sqrt(np.sum(x[name] ** 2)), np.sqrt(np.sum(g**2))
            ratio = 1.0
            if name not in unadapted and size > 0 and slope > 0:
                ratio = trust_coefficient * size / (slope + decay * size + eps)
            step = ratio * (g + decay * x[name])
            if lr_inside_momentum:
                step = learning_rate(t - 1) * step
            b[name] = momentum * b[name] + step
            u = momentum * b[name] + step if nesterov else b[name]
            x[name] = x[name] - (u if lr_inside_momentum else learning_rate(t - 1) * u)
        trajectory.append(x)
    return trajectory
