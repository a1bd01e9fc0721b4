"""Optimizers of ``keras.optimizers`` (3.15.1), under its names and with its defaults.

Each agrees with Keras on JAX to 1e-9 in float64.

These arguments mean the same for every port:

- ``learning_rate``: a number >= 0 or a schedule: step -> learning rate, the first step being 0.
- ``beta_1``, ``beta_2``: the decay rates of the moments, in [0, 1).
- ``epsilon``: the number that is added to the denominator, >= 0.
- ``weight_decay``: where it is set, x <- x - learning_rate weight_decay x precedes the step,
  outside the momentum and the norms; a number >= 0.
- ``exclude_from_weight_decay``: path patterns (``re.search``) of leaves that are not decayed. In
  Keras this is a method.
- ``clipnorm`` (the limit of the norm of each gradient), ``global_clipnorm`` (of all gradients
  together), ``clipvalue`` (of each entry): numbers >= 0. Only one of them can be set.
- ``name``: accepted and ignored.
- ``use_ema``, ``ema_momentum``, ``ema_overwrite_frequency``, ``loss_scale_factor`` and
  ``gradient_accumulation_steps`` are not supported and must be left at their defaults.

Every port raises `ArgumentValueError` for a number out of its range, `ArgumentTypeError` for a
wrong type, and ``NotImplementedError`` for an unsupported argument that is not its default::

    tx = ports.keras.AdamW(1e-3, weight_decay=0.01, global_clipnorm=1.0)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.optimizers.adadelta import adadelta
from optim_zoo.optimizers.adagrad import adagrad
from optim_zoo.ports._arguments import Rate, in_source_words
from optim_zoo.ports._keras_base import finished, with_base_arguments
from optim_zoo.ports._pieces import (
    chain,
    epsilon_hat,
    momentum_trace,
    rms_inside_momentum,
    scale_by_adam_epsilon_hat,
)
from optim_zoo.transforms import (
    cast_like_params,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_scheduled_nadam,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.amsgrad import scale_by_largest_moments
from optim_zoo.transforms.leafwise import Declaration, Leaf, leafwise, zeros
from optim_zoo.transforms.moments import moment


@in_source_words
@with_base_arguments
def SGD(
    learning_rate: Rate = 0.01,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies gradient descent with the learning rate inside the momentum.

    ::

        m <- momentum m + learning_rate g
        x <- x - m                       with nesterov  x - (momentum m + learning_rate g)

    Args:
      momentum: The decay rate of m, in [0, 1]. 0 keeps no momentum.
      nesterov: Looks one step ahead; without momentum it changes nothing.
    """
    return finished(
        "keras.SGD",
        sgd_inside(learning_rate, momentum, nesterov),
        learning_rate,
        weight_decay,
        base,
    )


def sgd_inside(
    learning_rate: Rate, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """Returns Keras's rule: m <- momentum m + learning_rate g, x <- x - m.

    With ``nesterov``, x <- x - (momentum m + learning_rate g).
    """
    return chain(
        scale_by_learning_rate(learning_rate, last=False),
        momentum_trace(momentum, nesterov=nesterov, highest=1.0),
        cast_like_params(),
    )


@in_source_words
@with_base_arguments
def Adam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies Adam with eps added to the uncorrected root, "epsilon hat" in the paper.

    ::

        u = sqrt(c2) / c1 mu / (sqrt(nu) + epsilon),   c1 = 1 - beta_1^t, c2 = 1 - beta_2^t

    `optim_zoo.adam` adds eps to the corrected root.

    Args:
      amsgrad: Divides by the largest second moment instead of the latest one.
    """
    step = chain(
        adam_direction(beta_1, beta_2, epsilon, amsgrad), scale_by_learning_rate(learning_rate)
    )
    return finished("keras.Adam", step, learning_rate, weight_decay, base)


def adam_direction(
    beta_1: float, beta_2: float, epsilon: float, amsgrad: bool
) -> optax.GradientTransformation:
    """Returns the direction of Keras's Adam or AMSGrad, without its learning rate."""
    if amsgrad:
        hat = epsilon_hat(beta_1, beta_2, epsilon)
        return scale_by_largest_moments("Adam", hat, beta_1, beta_2, epsilon)
    return scale_by_adam_epsilon_hat(beta_1, beta_2, epsilon)


@in_source_words
@with_base_arguments
def AdamW(
    learning_rate: Rate = 0.001,
    weight_decay: float = 0.004,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies `Adam` with decoupled weight decay."""
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    return Adam(learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, **base)


@in_source_words
@with_base_arguments
def Adagrad(
    learning_rate: Rate = 0.001,
    initial_accumulator_value: float = 0.1,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies `adagrad`.

    Args:
      initial_accumulator_value: The sum of squares before the first step, >= 0.
    """
    step = adagrad(learning_rate, initial_accumulator_value, epsilon)
    return finished("keras.Adagrad", step, learning_rate, weight_decay, base)


@in_source_words
@with_base_arguments
def Adadelta(
    learning_rate: Rate = 0.001,
    rho: float = 0.95,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies `adadelta`.

    Args:
      rho: The decay rate of both averages, in [0, 1).
    """
    step = adadelta(learning_rate, rho, epsilon)
    return finished("keras.Adadelta", step, learning_rate, weight_decay, base)


@in_source_words
@with_base_arguments
def RMSprop(
    learning_rate: Rate = 0.001,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-7,
    centered: bool = False,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies `rmsprop`: eps is inside the root and the learning rate inside the momentum.

    ::

        nu <- rho nu + (1 - rho) g^2
        m  <- momentum m + learning_rate g / sqrt(nu + epsilon)
        x  <- x - m

    Args:
      rho: The decay rate of the averages, in [0, 1).
      momentum: The decay rate of m, >= 0. 0 keeps no momentum.
      centered: Subtracts the square of the average gradient from nu.
    """
    step = rms_inside_momentum(learning_rate, rho, epsilon, momentum, centered=centered)
    return finished("keras.RMSprop", step, learning_rate, weight_decay, base)


@in_source_words
@with_base_arguments
def Nadam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies NAdam whose momentum is scheduled by 0.96^t: `scale_by_scheduled_nadam`.

    torch and tf_keras schedule it by 0.96^(0.004 t).
    """
    step = chain(
        scale_by_scheduled_nadam(beta_1, beta_2, epsilon, momentum_decay=1.0),
        scale_by_learning_rate(learning_rate),
    )
    return finished("keras.Nadam", step, learning_rate, weight_decay, base)


@in_source_words
@with_base_arguments
def Lamb(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies LAMB with the weight decay outside the trust ratio, before the norms are taken.

    ::

        x <- x - learning_rate weight_decay x
        x <- x - learning_rate |x| / |u| u,   u = Adam's direction

    In `optim_zoo.lamb`, as in the paper, the decay is part of the direction that the ratio scales.
    """
    step = chain(
        scale_by_adam(beta_1, beta_2, epsilon),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
    return finished("keras.Lamb", step, learning_rate, weight_decay, base)


@in_source_words
@with_base_arguments
def Lion(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    weight_decay: float | None = None,
    **base: Any,
) -> optax.GradientTransformation:
    """Applies Lion: the sign of an average of gradients (Chen et al., arXiv 2302.06675).

    ::

        u  = sign(beta_1 m + (1 - beta_1) g)
        m <- beta_2 m + (1 - beta_2) g
        x <- x - learning_rate u
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
    return finished("keras.Lion", step, learning_rate, weight_decay, base)
