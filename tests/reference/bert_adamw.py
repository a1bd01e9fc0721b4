"""BERT's Adam in float64 NumPy, following AdamWeightDecayOptimizer of google-research/bert.

It has no bias correction and adds the decay to the direction.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def bert_adamw(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
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
            u = m[name] / (np.sqrt(v[name]) + eps)
            if name not in undecayed:
                u = u + weight_decay * x[name]
            x[name] = x[name] - learning_rate(t - 1) * u
        trajectory.append(x)
    return trajectory
