"""NAdam (Dozat, ICLR workshop 2016) in float64 NumPy, without a schedule of the momentum."""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def nadam(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    n = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            n[name] = b2 * n[name] + (1 - b2) * g**2
            m_bar = b1 * m[name] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            n_hat = n[name] / (1 - b2**t)
            x[name] = x[name] - learning_rate(t - 1) * m_bar / (np.sqrt(n_hat) + eps)
        trajectory.append(x)
    return trajectory
