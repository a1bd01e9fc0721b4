"""Lookahead in float64 NumPy, following Algorithm 1 of arXiv 1907.08610."""

from collections.abc import Callable, Iterable

import numpy as np

Arrays = dict[str, np.ndarray]


def lookahead(
    params: Arrays,
    grads: Iterable[Arrays],
    *,
    inner: Callable[[Arrays, Arrays, int], Arrays],
    sync_period: int = 6,
    slow_step_size: float = 0.5,
) -> list[Arrays]:
    """Returns the fast weights after each step.

    Args:
      inner: The inner optimizer A: (fast weights, gradients, t = 1, 2, ...) -> fast weights.
    """
    fast = {name: value.astype(np.float64) for name, value in params.items()}
    slow = {name: value.copy() for name, value in fast.items()}
    trajectory = []
    for t, g_t in enumerate(grads, 1):
        fast = inner(fast, {name: g.astype(np.float64) for name, g in g_t.items()}, t)
        if t % sync_period == 0:
            for name in slow:
                slow[name] = slow[name] + slow_step_size * (fast[name] - slow[name])
            fast = {name: value.copy() for name, value in slow.items()}
        trajectory.append(fast)
    return trajectory
