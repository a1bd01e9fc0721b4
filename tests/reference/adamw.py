"""AdamW in float64 NumPy, following Algorithm 2 of arXiv 1711.05101.

The paper multiplies the decay by its schedule multiplier eta. Like common code, this file
multiplies it by the learning rate.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def adamw(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    bias_correction: bool = True,
    undecayed: Collection[str] = (),
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat = m[name] / (1 - b1**t) if bias_correction else m[name]
            v_hat = v[name] / (1 - b2**t) if bias_correction else v[name]
            decay = 0.0 if name in undecayed else weight_decay
            u = m_hat / (np.sqrt(v_hat) + eps) + decay * x[name]
            x[name] = x[name] - learning_rate(t - 1) * u
        trajectory.append(x)
    return trajectory
