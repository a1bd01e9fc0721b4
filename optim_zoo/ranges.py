"""Checks of arguments: numbers that are not traced, choices and transformations."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError

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

    A traced array passes, because its value is not known under ``optax.inject_hyperparams``,
    ``jit`` or ``vmap``.

    Args:
      name: The name of the argument, for the message.
      value: The value that was passed.
      low: The lower end of the range.
      high: The upper end of the range.
      open_low: Whether ``low`` itself is outside the range.
      open_high: Whether ``high`` itself is outside the range.

    Raises:
      ArgumentTypeError: ``value`` is not a number.
      ArgumentValueError: ``value`` is outside the range, as NaN always is, or it is an array of
        several numbers.
    """
    if isinstance(value, jax.core.Tracer):
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise ArgumentTypeError(name, f"be a number in {interval}", value)
    x = np.asarray(value)
    above = x > low if open_low else x >= low
    below = x < high if open_high else x <= high
    if not np.all(above & below):
        raise ArgumentValueError(name, f"be in {interval}", value)
    if x.ndim:
        raise several_numbers(name, value)


def several_numbers(name: str, value: Any) -> ArgumentValueError:
    """Returns the error of an array, traced or not, that was passed in place of one number."""
    sentence = f"{{argument}} must be one number, got an array of shape {jnp.shape(value)}"
    return ArgumentValueError(name, "be one number", value, sentence=sentence)


def check_count(name: str, value: Any, low: int = 0, *, caller: str = "") -> None:
    """Raises unless ``value`` is a whole number of at least ``low``; a traced array passes.

    Args:
      name: The name of the argument, for the message.
      value: The value that was passed.
      low: The least number that is allowed.
      caller: The function that was called; see `ArgumentError`.

    Raises:
      ArgumentTypeError: ``value`` is not a whole number.
      ArgumentValueError: ``value`` is below ``low``.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
        value = np.asarray(value)[()]  # optax.inject_hyperparams makes arrays of numbers
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(name, f"be a whole number >= {low}", value, caller=caller)
    if value < low:
        raise ArgumentValueError(name, f"be >= {low}", value, caller=caller)


def check_decay(name: str, value: Any) -> None:
    """Raises unless ``value`` is the decay rate of an average: a number in [0, 1).

    Raises:
      ArgumentTypeError: ``value`` is not a number, or it has fewer bits than float32, traced or
        not: bfloat16 rounds 0.999 to 1.
      ArgumentValueError: ``value`` is outside the range.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        expected = "be float32 or wider"
        advice = "pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams"
        sentence = f"{{argument}} must {expected}, got {dtype}, which rounds it: {advice}"
        raise ArgumentTypeError(name, expected, dtype, advice, sentence)
    check(name, value, 0.0, 1.0, open_high=True)


def check_learning_rate(value: Any) -> None:
    """Raises unless ``value`` is a finite number >= 0 or a schedule (a function of the step).

    Raises:
      ArgumentTypeError: ``value`` is neither a number nor callable.
      ArgumentValueError: ``value`` is a number outside the range.
    """
    if callable(value):
        return
    check("learning_rate", value, 0.0, open_high=True)


def check_bounds(name: str, bounds: Bounds | None) -> None:
    """Raises unless ``bounds`` is None or a pair (low, high), where None is an open side.

    Raises:
      ArgumentTypeError: ``bounds`` is not a pair of numbers or None.
      ArgumentValueError: A side is negative or NaN, or ``low`` is above ``high``.
    """
    if bounds is None:
        return
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        expected = "be a pair (low, high), None where a side is open"
        raise ArgumentTypeError(name, expected, bounds)
    for side in bounds:
        if side is not None:
            check(name, side, 0.0)
    low, high = bounds
    if any(side is None or isinstance(side, jax.core.Tracer) for side in bounds):
        return
    if low > high:  # type: ignore[operator]
        raise ArgumentValueError(name, "have low <= high", tuple(bounds))


def check_transformation(name: str, value: Any) -> None:
    """Raises `ArgumentTypeError` unless ``value`` is an ``optax.GradientTransformation``."""
    if not isinstance(value, optax.GradientTransformation):
        raise ArgumentTypeError(name, "be an optax.GradientTransformation", value)


def check_choice(kind: str, name: Any, names: Iterable[str], *, argument: str = "") -> None:
    """Raises unless ``name`` is one of ``names``.

    A name that differs in case only is the nearest.

    Args:
      kind: The kind of thing that is chosen, for the message, such as ``optimizer``.
      name: The name that was passed.
      names: The names that are allowed.
      argument: The name of the argument, if it is not ``kind``.

    Raises:
      ArgumentValueError: ``name`` is not one of ``names``. The message lists the nearest of them.
    """
    names = list(names)
    if name not in names:
        same = [known for known in names if known.casefold() == str(name).casefold()]
        near = same or difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(names)}"
        shown = kind if argument else "{argument}"
        raise ArgumentValueError(
            argument or kind,
            f"be one of {', '.join(names)}",
            name,
            advice,
            sentence=f"unknown {shown} {name!r}; {advice}",
        )
