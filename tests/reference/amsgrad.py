"""AMSGrad in float64 NumPy, following Algorithm 2 of arXiv 1904.09237.

The paper has no bias correction. Like torch.optim.Adam(amsgrad=True), this file takes the maximum
of the uncorrected second moments and corrects it afterwards.
"""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def amsgrad(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    learning_rate: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bias_correction: bool = True,
) -> list[Arrays]:
    """Returns the parameters after each step."""
    x = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    v_max = {name: np.zeros_like(value) for name, value in x.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            g = g_t[name].astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            v_max[name] = np.maximum(v_max[name], v[name])
            m_hat = m[name] / (1 - b1**t) if bias_correction else m[name]
            v_hat = v_max[name] / (1 - b2**t) if bias_correction else v_max[name]
            x[name] = x[name] - learning_rate(t - 1) * m_hat / (np.sqrt(v_hat) + eps)
        trajectory.append(x)
    return trajectory
