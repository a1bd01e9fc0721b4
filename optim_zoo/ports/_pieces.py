"""What ports share: directions with eps in other places, decay in other places, and refusals."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import errors, ranges, rules
from optim_zoo.errors import ArgumentTypeError, parameters_missing
from optim_zoo.transforms.adam import ScaleByLazyAdamState
from optim_zoo.transforms.leaf_by_leaf import chain_leaf_by_leaf
from optim_zoo.transforms.moments import Direction, bias, scale_by_moments
from optim_zoo.transforms.momentum import trace_momentum
from optim_zoo.transforms.radam import rectification
from optim_zoo.tree import Tree, wide

Rate = float | jax.Array | Callable[[Any], Any]  # a number, or step -> number, from step 0

# One argument a row: its name in the pieces, then those it has in the sources.
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
    """Makes the errors of a port name the arguments that the port has: ``lr must be ...``.

    The pieces of a port raise an `ArgumentError` about their own argument, such as ``b1``. It is
    raised again about the argument that the port passes on as that one, such as ``betas[0]``.
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
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {**dict(zip(arguments, args, strict=False)), **kwargs}
        for name, check in _CHECKS.items():
            if name in arguments and name in given:
                check(name, given[name])
        placed: Any = [named(*item) for item in zip(arguments, args, strict=False)]
        others: Any = {name: named(name, value) for name, value in kwargs.items()}
        with errors.renaming(own_names):
            return port(*(*placed, *args[len(placed) :]), **others)

    return called


def _check_pair(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentTypeError(name, "be a pair of numbers", value)


# By the names that sources have for such an argument.
_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "betas": _check_pair,
    "optimizer": ranges.check_transformation,
    "base_optimizer": ranges.check_transformation,
}


def momentum_trace(momentum: Any, *, nesterov: bool = False) -> optax.GradientTransformation | None:
    """Returns `trace_momentum` with the argument's name of the sources; None where it is 0."""
    if is_zero(momentum):
        return None
    with errors.renaming({"decay": "momentum"}):
        return trace_momentum(momentum, nesterov=nesterov)


def refuse(port: str, **arguments: tuple[Any, Any]) -> None:
    """Raises where an argument that the source has and the port has not is not its default.

    Args:
      port: the name of the port.
      arguments: name=(value, the source's default).

    Raises:
      NotImplementedError: one differs; it is named.
    """
    for name, (value, default) in arguments.items():
        # optax.inject_hyperparams traces every number, those left at their defaults too.
        if isinstance(value, jax.core.Tracer):
            continue
        if value is not default and value != default:
            raise NotImplementedError(
                f"{port} of optim_zoo does not support {name}={value!r}; leave it out "
                f"(the source's default is {default!r})"
            )


def check_arguments(
    port: str, given: Mapping[str, Any], known: Iterable[str], refused: Mapping[str, Any]
) -> None:
    """Checks those arguments of a port that the base class of its source has.

    Args:
      port: the name of the port.
      given: name -> value.
      known: the names that are supported.
      refused: name -> the source's default of those that are not.

    Raises:
      NotImplementedError: one that is not supported is not its default.
      TypeError: the source does not have one either. As for every keyword that Python itself
        refuses, there is no argument that an `ArgumentError` could name.
    """
    if unknown := sorted(set(given) - {*known, *refused}):
        raise TypeError(
            f"{port} has no argument {', '.join(unknown)}; beside its own it takes "
            f"{', '.join(sorted(known))}"
        )
    refuse(port, **{name: (given.get(name, default), default) for name, default in refused.items()})


def chain(*pieces: optax.GradientTransformation | None) -> optax.GradientTransformationExtraArgs:
    """`chain_leaf_by_leaf` of the pieces that are there, of which there must be one."""
    return chain_leaf_by_leaf(*(piece for piece in pieces if piece is not None))


def is_zero(x: Any) -> bool:
    """Whether ``x`` is the number 0.

    An array is not, whatever it holds: ``optax.inject_hyperparams`` gives a known one to ``init``
    and a traced one to ``update``, and both must make the same chain.
    """
    return isinstance(x, (int, float, np.number)) and x == 0


def none_if_zero(momentum: Any) -> Any:
    """Returns ``momentum``, or None in place of 0: the sources then keep no momentum."""
    return None if is_zero(momentum) else momentum


def at(rate: Rate, count: jax.Array) -> Any:
    """The rate at a step, from 0."""
    return rate(count) if callable(rate) else rate


def negated(maximize: bool) -> optax.GradientTransformation | None:
    """Gradients uphill, where torch is told to maximize."""
    return optax.scale(-1.0) if maximize else None


# Directions.


def epsilon_hat(b1: float, b2: float, eps: float) -> Direction:
    """Adam's direction with eps beside the uncorrected root, the paper's "epsilon hat".

    ::

        u = sqrt(c2) / c1 mu / (sqrt(nu) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t
    """

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        scale = jnp.sqrt(bias(b2, t)) / bias(b1, t)
        return scale * mu / (jnp.sqrt(nu) + eps)

    return direction


class ScaleByAdamEpsilonHatState(NamedTuple):
    """State of `scale_by_adam_epsilon_hat`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_adam_epsilon_hat(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, lazy: bool = False
) -> optax.GradientTransformation:
    """`scale_by_adam`, or with ``lazy`` `scale_by_lazy_adam`, with `epsilon_hat`."""
    state = ScaleByLazyAdamState if lazy else ScaleByAdamEpsilonHatState
    hat = epsilon_hat(b1, b2, eps)
    return scale_by_moments("Adam", hat, b1, b2, eps, state=state, lazy=lazy)


def radam_epsilon_hat(
    b1: float,
    b2: float,
    eps: float,
    *,
    threshold: float = 5.0,
    below: float = 1.0,
) -> Direction:
    """RAdam's direction with eps beside the uncorrected root.

    ::

        u = r_t sqrt(c2) / c1 mu / (sqrt(nu) + eps)   where rho_t >= threshold
        u = below mu / c1                             before

    ``>=`` and ``>`` do not differ: for no b2 is rho_t the threshold 5 itself.

    Args:
      b1, b2, eps, threshold: see `scale_by_radam`.
      below: 1 momentum, 0 no step, -1 a step in the wrong direction.
    """
    hat = epsilon_hat(b1, b2, eps)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        rho, r = rectification(b2, t)
        return jnp.where(rho >= threshold, r * hat(g, mu, nu, t), below * mu / bias(b1, t))

    return direction


def warmup_then_linear(
    learning_rate: Rate, total_steps: int, warmup_proportion: float, min_lr: float, first: int
) -> Rate:
    """The schedule inside TensorFlow Addons' RectifiedAdam, none where ``total_steps`` is 0.

    Args:
      learning_rate: at the end of the warmup.
      total_steps, warmup_proportion, min_lr: as there.
      first: what the first step counts as; 1 there.
    """
    ranges.check_learning_rate(learning_rate)
    ranges.check_count("total_steps", total_steps)
    ranges.check("warmup_proportion", warmup_proportion, 0.0, 1.0)
    ranges.check("min_lr", min_lr, 0.0, open_high=True)
    if not total_steps:
        return learning_rate
    warmup = total_steps * warmup_proportion

    def schedule(count: jax.Array) -> jax.Array:
        t = count + first
        peak = at(learning_rate, count)
        done = jnp.clip((t - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        return jnp.where(t <= warmup, peak * t / max(warmup, 1), peak + (min_lr - peak) * done)

    return schedule


# Decay.


class DecayState(NamedTuple):
    """State of `decay_before` and `decay_after`."""

    step: jax.Array  # (), int32: steps made
    inner: Any  # state of the inner optimizer


def decay_before(
    inner: optax.GradientTransformation, fraction: Rate, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
    """Decays x to (1 - fraction) x, and makes the inner optimizer's step from there.

    Args:
      inner: sees the decayed parameters.
      fraction: a number or a schedule; None or the number 0: no decay.
      exclude: path patterns of leaves that are not decayed.
    """

    def combine(x: jax.Array, u: jax.Array, f: Any) -> jax.Array:
        return u - f * wide(x)

    return _decay(inner, fraction, exclude, before=True, combine=combine)


def decay_after(
    inner: optax.GradientTransformation, fraction: Rate, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
    """The inner optimizer's step, and then x <- (1 - fraction) x; see `decay_before`."""

    def combine(x: jax.Array, u: jax.Array, f: Any) -> jax.Array:
        return wide(u) - f * (wide(x) + u)

    return _decay(inner, fraction, exclude, before=False, combine=combine)


def _decay(
    inner: optax.GradientTransformation,
    fraction: Rate,
    exclude: rules.Patterns,
    *,
    before: bool,
    combine: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> optax.GradientTransformation:
    rules.check_patterns("exclude_from_weight_decay", exclude)
    if fraction is None or is_zero(fraction):
        return inner

    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> DecayState:
        rules.check_matches("exclude_from_weight_decay", exclude, params)
        return DecayState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Tree, state: DecayState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, DecayState]:
        if params is None:
            raise parameters_missing("weight decay")
        f = at(fraction, state.step)
        excluded = rules.mask(exclude, params)
        seen = params
        if before:
            seen = jax.tree.map(lambda x, skip: x if skip else wide(x) * (1 - f), params, excluded)
        steps, inner_state = inner.update(updates, state.inner, seen, **extra)
        steps = jax.tree.map(
            lambda u, x, skip: (u if skip else combine(x, u, f)).astype(x.dtype),
            steps,
            params,
            excluded,
        )
        return steps, DecayState(optax.safe_increment(state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def times(rate: Rate, factor: float | None) -> Rate:
    """Rate * factor; 0 where there is no factor."""
    if factor is None or is_zero(factor):
        return 0.0
    return (lambda count: rate(count) * factor) if callable(rate) else rate * factor


def patterns(given: Sequence[str] | None) -> rules.Patterns:
    """The patterns, none for None."""
    return () if given is None else given
