"""How ports check the arguments that they share with their sources, and name them in errors."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from optim_zoo import errors, ranges, rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError

Rate = float | jax.Array | Callable[[Any], Any]  # a number, or a schedule: step from 0 -> number

# Each row is one argument: its name in our pieces, then its names in the sources.
_NAMES = (
    ("learning_rate", "lr", "init_lr"),
    ("b1", "beta_1", "betas[0]"),
    ("b2", "beta_2", "betas[1]"),
    ("eps", "epsilon"),
    ("decay", "rho", "alpha"),
    ("weight_decay", "weight_decay_rate"),
    ("momentum_decay", "schedule_decay"),
    ("trust_coefficient", "trust_coeff", "eeta"),
    ("threshold", "sma_threshold", "n_sma_threshold"),
    ("max_norm", "max_grad_norm"),
    ("nesterov", "use_nesterov"),
    ("inner", "optimizer", "base_optimizer"),
    ("sync_period", "k", "la_steps"),
    ("slow_step_size", "alpha", "la_alpha"),
    ("warmup_steps", "num_warmup_steps"),
    ("total_steps", "num_train_steps"),
)

P = ParamSpec("P")
R = TypeVar("R")


def in_source_words(port: Callable[P, R]) -> Callable[P, R]:
    """Makes errors name the arguments of a port, as in ``lr must be ...``.

    A piece of a port raises an `ArgumentError` that names the argument of the piece, such as
    ``b1``. This function re-raises it with the name of the port's argument, such as ``betas[0]``.
    """
    parameters = inspect.signature(port).parameters
    arguments = list(parameters)

    def own_name(name: str) -> str:
        others = [other for names in _NAMES if name in names for other in names]
        own = [other for other in (name, *others) if other.partition("[")[0] in arguments]
        return own[0] if own else name

    own_names = {name: own_name(name) for names in _NAMES for name in names}

    def named(name: str, value: Any) -> Any:
        if not name.startswith("exclude_from_"):
            return value
        if value is None and name in parameters and parameters[name].default is None:
            return None
        return rules.named(name, value)

    @functools.wraps(port)
    def renaming_port(*args: P.args, **kwargs: P.kwargs) -> R:
        passed = {**dict(zip(arguments, args, strict=False)), **kwargs}
        for name, check in _CHECKS.items():
            if name in arguments and name in passed:
                check(name, passed[name])
        positional: Any = [named(*item) for item in zip(arguments, args, strict=False)]
        keywords: Any = {name: named(name, value) for name, value in kwargs.items()}
        with errors.renaming(own_names):
            return port(*(*positional, *args[len(positional) :]), **keywords)

    return renaming_port


def _check_pair(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentTypeError(name, "be a pair of numbers", value)


# Keyed by the names that the sources use for such an argument.
_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "betas": _check_pair,
    "optimizer": ranges.check_transformation,
    "base_optimizer": ranges.check_transformation,
}


def refuse(port: str, **arguments: tuple[Any, Any]) -> None:
    """Raises where an argument that the port does not support differs from the source's default.

    Args:
      port: the name of the port.
      arguments: name=(value, the source's default).

    Raises:
      NotImplementedError: an argument differs; the message names it.
    """
    for name, (value, default) in arguments.items():
        # optax.inject_hyperparams traces every number, including defaults.
        if isinstance(value, jax.core.Tracer):
            continue
        if value is not default and value != default:
            raise NotImplementedError(
                f"{port} of optim_zoo does not support {name}={value!r}; leave it out "
                f"(the source's default is {default!r})"
            )


def check_arguments(
    port: str, passed: Mapping[str, Any], known: Iterable[str], refused: Mapping[str, Any]
) -> None:
    """Checks the arguments of a port that belong to the base class of its source.

    Args:
      port: the name of the port.
      passed: name -> value.
      known: the names that are supported.
      refused: name -> the source's default, for the names that are not supported.

    Raises:
      NotImplementedError: an argument that is not supported differs from its default.
      TypeError: the source does not have such an argument either. It is a plain ``TypeError``, as
        for any unknown keyword, because there is no argument for an `ArgumentError` to name.
    """
    if unknown := sorted(set(passed) - {*known, *refused}):
        raise TypeError(
            f"{port} has no argument {', '.join(unknown)}; besides its own it accepts "
            f"{', '.join(sorted(known))}"
        )
    refuse(
        port, **{name: (passed.get(name, default), default) for name, default in refused.items()}
    )


def check_momentum(momentum: Any, highest: float = np.inf) -> None:
    """Raises unless ``momentum`` is a number that the source accepts: from 0 to ``highest``.

    A momentum of 1 or more never forgets a gradient. Some sources accept it; our own optimizers
    do not.

    Raises:
      ArgumentTypeError: it is not a number, or it has fewer bits than float32.
      ArgumentValueError: it is outside the range.
    """
    ranges.check("momentum", momentum, 0.0, highest, open_high=np.isinf(highest))
    if isinstance(momentum, jax.core.Tracer) or momentum < 1:
        ranges.check_decay("momentum", momentum)


def check_nesterov(momentum: float, dampening: float = 0.0) -> None:
    """Raises `ArgumentValueError` unless Nesterov's momentum has momentum and no dampening."""
    if is_zero(momentum):
        raise ArgumentValueError(
            "nesterov",
            "be False without momentum",
            True,
            "set momentum, such as 0.9",
            sentence="{argument} needs a momentum above 0, got 0: set momentum, such as 0.9",
            related=["momentum"],
        )
    # An array, traced or not, comes from optax.inject_hyperparams.
    if isinstance(dampening, (int, float)) and dampening != 0:
        raise ArgumentValueError(
            "nesterov",
            "be False with dampening",
            True,
            "leave one out",
            sentence=f"{{argument}} cannot be combined with dampening, got {dampening}: "
            "leave one out",
            related=["dampening"],
        )


def is_zero(x: Any) -> bool:
    """Returns whether ``x`` is the Python number 0.

    The result is False for every array: ``optax.inject_hyperparams`` passes a concrete array to
    ``init`` and a traced one to ``update``, and both must build the same chain.
    """
    return isinstance(x, (int, float, np.number)) and x == 0


def patterns(passed: Sequence[str] | None) -> rules.Patterns:
    """Returns the patterns, or an empty tuple for None."""
    return () if passed is None else passed
