r"""The exact part: two coordinates whose gradients have the scales 1 and 100.

The loss is linear, so that its gradient is known: ``s z_t`` with s = 1 or 100 and signs z_t. Every
optimizer runs twice, with z and with -z, and the mean of the two runs is what remains of the
parameter. For SGD and AdamW the gradients cancel in this mean, and exactly

::

    (x_t + x'_t) / 2 = (1 - learning_rate weight_decay)^t

remains of both coordinates, from x = 1. With Adam and L2 the decay is divided by the root of the
second moment, which is close to s: about ``exp(-learning_rate weight_decay t / s)`` remains.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import adam, adamw, add_decayed_weights, sgd

SCALES = (1.0, 100.0)
STEPS, LEARNING_RATE, WEIGHT_DECAY = 1000, 0.01, 0.1

OPTIMIZERS = MappingProxyType(
    {
        "SGD, L2": lambda: optax.chain(add_decayed_weights(WEIGHT_DECAY), sgd(LEARNING_RATE)),
        "SGD, decoupled": lambda: optax.chain(
            optax.identity(), add_decayed_weights(WEIGHT_DECAY), optax.scale(-LEARNING_RATE)
        ),
        "Adam, L2": lambda: optax.chain(add_decayed_weights(WEIGHT_DECAY), adam(LEARNING_RATE)),
        "AdamW": lambda: adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    }
)


def signs() -> np.ndarray:
    """Returns the signs of the gradients, (steps,): as many 1 as -1, in a fixed random order."""
    return np.random.default_rng(0).permutation(np.repeat([1.0, -1.0], STEPS // 2))


def kept() -> Mapping[str, np.ndarray]:
    """Returns what each optimizer leaves of both coordinates after every step, in float64.

    Returns:
      Optimizer -> shares, (steps, 2): of the coordinates with the gradient scales 1 and 100.
    """
    with jax.enable_x64(True):
        return {name: np.asarray(_kept(make())) for name, make in OPTIMIZERS.items()}


def _kept(tx: optax.GradientTransformation) -> jax.Array:
    gradients = signs()[:, None, None] * np.array([1.0, -1.0])[:, None] * np.array(SCALES)
    x = jnp.ones((2, len(SCALES)))  # (sign of the run, coordinate)

    def step(carry: tuple[Any, Any], gradient: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        x, state = carry
        updates, state = tx.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.mean(x, 0)

    return jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), jnp.asarray(gradients))[1])()
