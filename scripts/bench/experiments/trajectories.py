"""A row of the table, and the short runs that the experiments observe."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optim_zoo.tree import Tree

EVERY = 4  # micro-batches per step
LEARNING_RATE = 1e-3


class Row(NamedTuple):
    """A row of the table."""

    situation: str
    optax: str
    optim_zoo: str
    figures: Mapping[str, Any]  # the measured values that the cells state


def jitted_step(tx: Any) -> Callable[..., tuple[Tree, Tree]]:
    """Jits a step of ``tx``: (params, state, gradients, **extra) -> (params, state)."""

    @jax.jit
    def step(params: Tree, state: Tree, gradients: Tree, **extra: Any) -> tuple[Tree, Tree]:
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run_with_states(
    tx: Any, params: Tree, gradients: Sequence[Tree], extra: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[Tree], list[Tree]]:
    """Returns the parameters and the states after each gradient.

    Args:
      tx: the optimizer.
      params: the parameters before the first step.
      gradients: the gradients of each step.
      extra: keyword arguments of ``tx.update`` for each step; none if empty.
    """
    step, state = jitted_step(tx), tx.init(params)
    made: tuple[list[Tree], list[Tree]] = ([], [])
    for i, g in enumerate(gradients):
        params, state = step(params, state, g, **(extra[i] if extra else {}))
        made[0].append(params)
        made[1].append(state)
    return made


def run(
    tx: Any, params: Tree, gradients: Sequence[Tree], extra: Sequence[Mapping[str, Any]] = ()
) -> list[Tree]:
    """Returns the parameters after each gradient; see `run_with_states`."""
    return run_with_states(tx, params, gradients, extra)[0]


def scan(tx: Any, params: Tree, gradients: Tree, steps: int) -> tuple[Tree, Tree]:
    """Returns the parameters and the state after ``steps`` steps with the same gradients."""
    step = jitted_step(tx)

    def body(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
        return step(*carry, gradients), None

    return jax.lax.scan(body, (params, tx.init(params)), None, length=steps)[0]


def scan_raises(tx: Any, params: Tree, gradients: Tree) -> str:
    """Returns the name of the error that tracing a scan of two steps raises, or ""."""
    try:
        jax.eval_shape(functools.partial(scan, tx, steps=2), params, gradients)
    except TypeError as error:
        return type(error).__name__
    return ""


def same_bits(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> bool:
    """Whether two arrays are equal bit for bit, so that -0.0 differs from 0.0."""
    return np.asarray(x).tobytes() == np.asarray(y).tobytes()
