"""AdaGrad with a diagonal matrix (Duchi et al., JMLR 12, 2011) in float64 NumPy.

The paper adds delta to the square root. Like common code, this file adds eps under the root.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def adagrad(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    s = {name: np.full_like(value, initial_accumulator_value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            s[name] = s[name] + g**2
            x[name] = x[name] - learning_rate(t - 1) * g / np.sqrt(s[name] + eps)
        trajectory.append(x)
    return trajectory
