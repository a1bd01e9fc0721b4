"""Checks of numbers a user passes, made only where they are still numbers."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Bounds = Sequence[float | None]  # (low, high), None where a side is open


def check(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises unless ``value`` is a number between ``low`` and ``high``.

    A traced array passes: under ``optax.inject_hyperparams``, ``jit`` or ``vmap`` its value is
    not known yet.

    Raises:
      TypeError: ``value`` is not a number.
      ValueError: it lies outside the range; NaN does. Or it is several numbers.
    """
    if isinstance(value, jax.core.Tracer):
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name} must be a number in {interval}, got {value!r}")
    x = np.asarray(value)
    above = x > low if open_low else x >= low
    below = x < high if open_high else x <= high
    if not np.all(above & below):
        raise ValueError(f"{name} must be in {interval}, got {value}")
    if x.ndim:
        raise ValueError(f"{name} must be one number, got an array of shape {x.shape}")


def check_count(name: str, value: Any, low: int = 0) -> None:
    """Raises unless ``value`` is a whole number of at least ``low``."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
        value = np.asarray(value)[()]  # optax.inject_hyperparams makes arrays of numbers
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number >= {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def check_decay(name: str, value: Any) -> None:
    """Raises unless ``value`` is the decay rate of an average: a number in [0, 1).

    Raises:
      TypeError: it has fewer bits than float32, traced or not: bfloat16 rounds 0.999 to 1.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} must be float32 or wider, got {dtype}, which rounds it: give "
            f"optax.inject_hyperparams hyperparam_dtype=jnp.float32"
        )
    check(name, value, 0.0, 1.0, open_high=True)


def check_learning_rate(value: Any) -> None:
    """Raises unless ``value`` is a finite number >= 0 or a schedule (a function of the step)."""
    if callable(value):
        return
    check("learning_rate", value, 0.0, open_high=True)


def check_bounds(name: str, bounds: Bounds | None) -> None:
    """Raises unless ``bounds`` is None or a pair (low, high), 0 <= low <= high, None if open."""
    if bounds is None:
        return
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(
            f"{name} must be a pair (low, high), None where a side is open, got {bounds!r}"
        )
    for side in bounds:
        if side is not None:
            check(name, side, 0.0)
    low, high = bounds
    if any(side is None or isinstance(side, jax.core.Tracer) for side in bounds):
        return
    if low > high:  # type: ignore[operator]
        raise ValueError(f"{name} must have low <= high, got {tuple(bounds)}")


def check_choice(kind: str, name: Any, names: Iterable[str]) -> None:
    """Raises ``ValueError`` unless ``name`` is one of ``names``, with the nearest of them."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(names)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
