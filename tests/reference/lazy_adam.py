"""LazyAdam in float64 NumPy: Adam (arXiv 1412.6980) on the rows that have a gradient.

The gradient of a table is a pair (ids, rows). Rows with the same id are summed, and an id equal to
the number of rows of the table is padding. The bias correction counts all steps.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

Arrays = dict[str, np.ndarray]
Gradient = np.ndarray | tuple[np.ndarray, np.ndarray]


def lazy_adam(
    params: Arrays,
    grads: Iterable[Mapping[str, Gradient]],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = {name: value.copy() for name, value in x.items()}
        for name in x:
            gradient = g_t[name]
            present: dict[object, np.ndarray] = {}
            if isinstance(gradient, tuple):
                for i, row in zip(*gradient, strict=True):
                    if i < len(x[name]):
                        present[i] = present.get(i, 0.0) + row.astype(np.float64)
            else:
                present[...] = gradient.astype(np.float64)
            for i, g in present.items():
                m[name][i] = b1 * m[name][i] + (1 - b1) * g
                v[name][i] = b2 * v[name][i] + (1 - b2) * g**2
                m_hat, v_hat = m[name][i] / (1 - b1**t), v[name][i] / (1 - b2**t)
                x[name][i] -= learning_rate(t - 1) * m_hat / (np.sqrt(v_hat) + eps)
        trajectory.append(x)
    return trajectory
