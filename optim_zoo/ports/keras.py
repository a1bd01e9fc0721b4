"""``keras.optimizers`` (3.15.1).

Decay, where there is ``weight_decay``, comes before the step: x <- x - learning_rate weight_decay
x, outside the momentum and the norms. What Keras says with ``exclude_from_weight_decay(...)``, a
method, is the argument of that name. Of the arguments of its base class ``clipnorm`` (each array
by itself), ``clipvalue`` and ``global_clipnorm`` are supported, one of them at a time. ``name``
changes nothing. The others are refused unless left out. Each agrees with Keras on JAX to 1e-9 in
float64.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import norms
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.optimizers.adagrad import adagrad
from optim_zoo.ports._arguments import Rate, check_arguments, in_source_words, refuse
from optim_zoo.ports._pieces import (
    chain,
    decay_before,
    epsilon_hat,
    momentum_trace,
    rms_inside_momentum,
    scale_by_adam_epsilon_hat,
    times,
)
from optim_zoo.rows import check_updates
from optim_zoo.transforms import (
    cast_like_params,
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_scheduled_nadam,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.amsgrad import scale_by_largest_moments
from optim_zoo.transforms.leafwise import Declaration, Leaf, leafwise, zeros
from optim_zoo.transforms.moments import moment
from optim_zoo.tree import Tree, wide

CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_REFUSED: dict[str, Any] = {
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
# The arguments of the base class with their defaults, in its order.
_BASE: dict[str, Any] = {**dict.fromkeys(CLIPPING), **_REFUSED, "name": None}
# Of the base class that Keras had before, which TensorFlow Addons and tf_keras.legacy build on.
REFUSED_BEFORE: dict[str, Any] = {
    "lr": None,
    "decay": 0.0,
    "gradient_aggregator": None,
    "gradient_transformers": None,
}


def _with_base_arguments(
    port: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """Puts the arguments of Keras's base class in the place of ``**base``, by position too."""
    *own, _ = inspect.signature(port).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    base = [inspect.Parameter(name, kind, default=default) for name, default in _BASE.items()]
    exclude = inspect.Parameter(
        "exclude_from_weight_decay", inspect.Parameter.KEYWORD_ONLY, default=()
    )
    signature = inspect.Signature([*own, *base, exclude])

    @functools.wraps(port)
    def called(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        check_arguments(f"keras.{port.__name__}", kwargs, signature.parameters, {})
        return port(**signature.bind(*args, **kwargs).arguments)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


@in_source_words
@_with_base_arguments
def SGD(
    learning_rate: Rate = 0.01,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """The learning rate stands inside the momentum; ``nesterov`` without momentum is nothing."""
    return _finished(
        "keras.SGD",
        sgd_inside(learning_rate, momentum, nesterov),
        learning_rate,
        weight_decay,
        base,
    )


def sgd_inside(
    learning_rate: Rate, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """Keras's rule: m <- momentum m + learning_rate g, x <- x - m.

    With ``nesterov``, x <- x - (momentum m + learning_rate g).
    """
    return chain(
        scale_by_learning_rate(learning_rate, last=False),
        momentum_trace(momentum, nesterov=nesterov, highest=1.0),
        cast_like_params(),
    )


@in_source_words
@_with_base_arguments
def Adam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected root, the paper's "epsilon hat"."""
    step = chain(
        adam_direction(beta_1, beta_2, epsilon, amsgrad), scale_by_learning_rate(learning_rate)
    )
    return _finished("keras.Adam", step, learning_rate, weight_decay, base)


def adam_direction(
    beta_1: float, beta_2: float, epsilon: float, amsgrad: bool
) -> optax.GradientTransformation:
    """Keras's Adam or AMSGrad, without its learning rate."""
    if amsgrad:
        hat = epsilon_hat(beta_1, beta_2, epsilon)
        return scale_by_largest_moments("Adam", hat, beta_1, beta_2, epsilon)
    return scale_by_adam_epsilon_hat(beta_1, beta_2, epsilon)


@in_source_words
@_with_base_arguments
def AdamW(
    learning_rate: Rate = 0.001,
    weight_decay: float = 0.004,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    **base: Any,
) -> optax.GradientTransformation:
    """`Adam` with decay."""
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    return Adam(learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, **base)


@in_source_words
@_with_base_arguments
def Adagrad(
    learning_rate: Rate = 0.001,
    initial_accumulator_value: float = 0.1,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """`adagrad`."""
    step = adagrad(learning_rate, initial_accumulator_value, epsilon)
    return _finished("keras.Adagrad", step, learning_rate, weight_decay, base)


@in_source_words
@_with_base_arguments
def Adadelta(
    learning_rate: Rate = 0.001,
    rho: float = 0.95,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """`adadelta`."""
    step = adadelta(learning_rate, rho, epsilon)
    return _finished("keras.Adadelta", step, learning_rate, weight_decay, base)


@in_source_words
@_with_base_arguments
def RMSprop(
    learning_rate: Rate = 0.001,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-7,
    centered: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """`rmsprop`: eps inside the root, the learning rate inside the momentum."""
    step = rms_inside_momentum(learning_rate, rho, epsilon, momentum, centered=centered)
    return _finished("keras.RMSprop", step, learning_rate, weight_decay, base)


@in_source_words
@_with_base_arguments
def Nadam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """NAdam whose momentum is scheduled by 0.96^t: `scale_by_scheduled_nadam`."""
    step = chain(
        scale_by_scheduled_nadam(beta_1, beta_2, epsilon, momentum_decay=1.0),
        scale_by_learning_rate(learning_rate),
    )
    return _finished("keras.Nadam", step, learning_rate, weight_decay, base)


@in_source_words
@_with_base_arguments
def Lamb(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """The decay stands outside the trust ratio, whose norm is of the decayed parameters.

    In `optim_zoo.lamb`, as in the paper, it is part of the direction that the ratio scales.
    """
    step = chain(
        scale_by_adam(beta_1, beta_2, epsilon),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
    return _finished("keras.Lamb", step, learning_rate, weight_decay, base)


@in_source_words
@_with_base_arguments
def Lion(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """The sign of an average of gradients (Chen et al., arXiv 2302.06675).

    ::

        u  = sign(beta_1 m + (1 - beta_1) g)
        m <- beta_2 m + (1 - beta_2) g
    """
    ranges.check("beta_1", beta_1, 0.0, 1.0, open_low=True)
    ranges.check_decay("beta_2", beta_2)

    def update(
        g: jax.Array, state: optax.TraceState, leaf: Leaf
    ) -> tuple[jax.Array, optax.TraceState]:
        del leaf
        m = state.trace
        return jnp.sign(moment(g, m, beta_1)), state._replace(trace=moment(g, m, beta_2))

    direction = leafwise(
        Declaration(
            name="keras.Lion",
            update=update,
            state=optax.TraceState,
            like_params=("trace",),
            init=lambda path, x: {"trace": zeros(x)},
        )
    )
    step = chain(direction, scale_by_learning_rate(learning_rate))
    return _finished("keras.Lion", step, learning_rate, weight_decay, base)


def _finished(
    port: str,
    step: optax.GradientTransformation,
    learning_rate: Rate,
    weight_decay: float | None,
    base: dict[str, Any],
) -> optax.GradientTransformation:
    """What the base class adds: clipping in front, and decay before the step.

    Args:
      port: its name, for messages.
      step: the optimizer.
      learning_rate, weight_decay: of the optimizer.
      base: the other arguments of the base class, and ``exclude_from_weight_decay``.

    Raises:
      NotImplementedError: an argument that is not supported is not its default.
    """
    exclude = base.get("exclude_from_weight_decay", ())
    refuse(port, **{name: (base.get(name, default), default) for name, default in _REFUSED.items()})
    if weight_decay is not None:
        ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude_from_weight_decay", exclude)
    return chain(clipping(base), decay_before(step, times(learning_rate, weight_decay), exclude))


def clipping(base: dict[str, Any]) -> optax.GradientTransformation | None:
    """The clipping that ``clipnorm``, ``global_clipnorm`` or ``clipvalue`` asks for."""
    given = {name: base[name] for name in CLIPPING if base.get(name) is not None}
    for name, value in given.items():
        ranges.check(name, value, 0.0, open_high=True)
    if len(given) > 1:
        first, *others = given
        raise ArgumentValueError(
            first,
            "be the only clipping that is set",
            given,
            sentence=f"only one of {', '.join(CLIPPING)} can be set, got {given}",
            related=others,
        )
    if base.get("clipnorm"):
        return optax.stateless(lambda grads, _: _clip_each(grads, base["clipnorm"]))
    if base.get("global_clipnorm"):
        return clip_by_global_norm(base["global_clipnorm"])
    return optax.clip(base["clipvalue"]) if base.get("clipvalue") else None


def _clip_each(grads: Tree, max_norm: float) -> Tree:
    check_updates("clipnorm", grads, grads)

    def clip(g: jax.Array) -> jax.Array:
        norm = norms.norm(g)
        return wide(g) * jnp.where(norm <= max_norm, 1.0, max_norm / norm)

    return jax.tree.map(clip, grads)
