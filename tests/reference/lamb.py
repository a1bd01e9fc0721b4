"""LAMB in float64 NumPy, following Algorithm 2 of arXiv 1904.00962 (version 5).

Every array is one layer. Version 3 of the paper has no bias correction.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def lamb(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    phi: Callable[[float], float] = lambda z: z,
    undecayed: Collection[str] = (),
    unadapted: Collection[str] = (),
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
            r = m_hat / (np.sqrt(v_hat) + eps)
            u = r if name in undecayed else r + weight_decay * x[name]
            size, step = phi(float(np.sqrt(np.sum(x[name] ** 2)))), np.sqrt(np.sum(u**2))
            adapted = name not in unadapted and size > 0 and step > 0
            ratio = size / step if adapted else 1.0
            x[name] = x[name] - learning_rate(t - 1) * ratio * u
        trajectory.append(x)
    return trajectory
