"""Ranger (Wright, 2019) in float64 NumPy: RAdam (arXiv 1908.03265) inside Lookahead (1907.08610),
with gradient centralization (2004.01461).

A gradient of rank above 1 is centralized over all axes but the last, the output features.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def ranger(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.95,
    b2: float = 0.999,
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    sync_period: int = 6,
    slow_step_size: float = 0.5,
    threshold: float = 5.0,
    gradient_centralization: bool = False,
    undecayed: Collection[str] = (),
) -> list[Arrays]:
    """Returns the fast weights after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    slow = dict(x)
    rho_inf = 2 / (1 - b2) - 1
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        for name in x:
            g = g_t[name].astype(np.float64)
            if gradient_centralization and g.ndim > 1:
                for feature in range(g.shape[-1]):
                    g[..., feature] -= np.mean(g[..., feature])
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            u = m[name] / (1 - b1**t)
            if rho >= threshold:
                rectified = (rho - 4) * (rho - 2) * rho_inf
                r = np.sqrt(rectified / ((rho_inf - 4) * (rho_inf - 2) * rho))
                u = r * u / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            if name not in undecayed:
                u = u + weight_decay * x[name]
            x[name] = x[name] - learning_rate(t - 1) * u
            if t % sync_period == 0:
                slow[name] = slow[name] + slow_step_size * (x[name] - slow[name])
                x[name] = slow[name]
        trajectory.append(x)
    return trajectory
