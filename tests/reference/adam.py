"""Adam in float64 NumPy, following Algorithm 1 of arXiv 1412.6980."""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def adam(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bias_correction: bool = True,
    l2: float = 0.0,
) -> list[Arrays]:
    """Returns the parameters after each step; ``l2`` adds l2 |x|^2 / 2 to the loss."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64) + l2 * x[name]
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat = m[name] / (1 - b1**t) if bias_correction else m[name]
            v_hat = v[name] / (1 - b2**t) if bias_correction else v[name]
            x[name] = x[name] - learning_rate(t - 1) * m_hat / (np.sqrt(v_hat) + eps)
        trajectory.append(x)
    return trajectory
