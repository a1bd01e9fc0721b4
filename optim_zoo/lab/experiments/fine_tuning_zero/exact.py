r"""What is exact: how far each optimizer moves under a constant gradient, and the first sync.

Every optimizer moves a coordinate whose gradient is always 1, from 0, in float64. It starts at 0,
so that slow weights that start at zero change nothing here. With the learning rate gamma_s at step
s = 1, 2, ..., up to eps, a coordinate moves by the sum over s of

::

    BERT's Adam   gamma_s (1 - b1^s) / sqrt(1 - b2^s)
    Adam          gamma_s
    RAdam         gamma_s r_s, and gamma_s in the first five steps, where r_s is not defined

and Lookahead by alpha times that of its inner optimizer, where the steps are whole periods.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo.lab.experiments.fine_tuning_zero.arms import BASE, FIRST_SYNC, OPTIMIZERS
from optim_zoo.lab.experiments.fine_tuning_zero.settings import Scale
from optim_zoo.schedules import warmup_polynomial

STEPS = 1000
MOVING = (BASE, "lifeiteng.RAdam", "lookahead", "ranger")
_RATE = 1e-6  # so small that weight decay changes no digit


def constant(step: Any) -> float:
    """Returns a constant learning rate."""
    del step
    return _RATE


def schedule(scale: Scale) -> optax.Schedule:
    """Returns the schedule of the experiment."""
    return warmup_polynomial(_RATE, scale.warmup_steps, scale.steps)


def movements(schedule: optax.Schedule, steps: int) -> Mapping[str, float]:
    """Returns how far a coordinate moves whose gradient is always 1: optimizer -> distance."""
    with jax.enable_x64(True):
        return {
            name: abs(float(_moved(OPTIMIZERS[name](schedule), jnp.zeros(()), steps)))
            for name in MOVING
        }


def kept_by_first_sync() -> Mapping[str, float]:
    """Returns what the first synchronization leaves of a parameter whose learning rate is 0.

    Returns:
      Optimizer -> the parameter after the synchronization, divided by that before it: 1 where the
      slow weights start as the parameters, alpha where they start at zero.
    """
    return {
        name: float(_moved(OPTIMIZERS[name](_zero), jnp.ones(()), step))
        for name, (_, step) in FIRST_SYNC.items()
    }


def _zero(step: Any) -> float:
    del step
    return 0.0


def _moved(tx: optax.GradientTransformation, x: jax.Array, steps: int) -> jax.Array:
    """Returns a parameter after ``steps`` gradients of 1."""

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        x, state = carry
        updates, state = tx.update(jnp.ones_like(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    run: Callable[[], Any] = jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), length=steps))
    return run()[0][0]


def closed_forms(rates: np.ndarray, b1: float = 0.9, b2: float = 0.999) -> Mapping[str, float]:
    """Returns the sums of the formulas above for the learning rates of all steps.

    Returns:
      ``bert_adam``, ``adam`` and ``radam`` -> distance.
    """
    s = np.arange(1, len(rates) + 1)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * s * b2**s / (1 - b2**s)
    inside = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    r = np.where(rho >= 5, np.sqrt(np.maximum(inside, 0)), 1)
    return {
        "bert_adam": float(np.sum(rates * (1 - b1**s) / np.sqrt(1 - b2**s))),
        "adam": float(np.sum(rates)),
        "radam": float(np.sum(rates * r)),
    }
