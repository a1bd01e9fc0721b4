"""The general strategy of arXiv 1904.00962, section 3, for any base algorithm, in float64 NumPy.

Every array is one layer.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def layerwise_adaptive(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    base: Callable[[str, np.ndarray, int], np.ndarray],
    learning_rate: Callable[[int], float],
    phi: Callable[[float], float] = lambda z: z,
    unadapted: Collection[str] = (),
) -> list[Arrays]:
    """Returns the parameters after each step.

    Args:
      base: The base algorithm A: (name of a layer, its gradient, t = 1, 2, ...) -> direction u.
    """
    x = {name: value.astype(np.float64) for name, value in params.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        x = dict(x)
        for name in x:
            u = base(name, g_t[name].astype(np.float64), t)
            size, step = phi(float(np.sqrt(np.sum(x[name] ** 2)))), np.sqrt(np.sum(u**2))
            adapted = name not in unadapted and size > 0 and step > 0
            ratio = size / step if adapted else 1.0
            x[name] = x[name] - learning_rate(t - 1) * ratio * u
        trajectory.append(x)
    return trajectory
