"""Optimizers of ``tensorflow_addons.optimizers`` (0.23.0), under its names and with its defaults.

Each agrees with the source to 1e-9 in float64. ``learning_rate``, ``beta_1``, ``beta_2``,
``epsilon``, ``clipnorm``, ``clipvalue``, ``global_clipnorm`` and ``name`` mean what they mean in
`ports.keras`, and errors are raised as there::

    tx = ports.tensorflow_addons.AdamW(weight_decay=1e-4, learning_rate=1e-3)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lamb import lamb
from optim_zoo.optimizers.lookahead import lookahead
from optim_zoo.ports import _keras_base, keras
from optim_zoo.ports._arguments import Rate, check_arguments, in_source_words, patterns, refuse
from optim_zoo.ports._decay import add_scheduled_decay, decay_before
from optim_zoo.ports._pieces import chain, scale_by_adam_epsilon_hat, warmup_then_linear
from optim_zoo.transforms import ScaleByRadamState, scale_by_learning_rate
from optim_zoo.transforms.amsgrad import scale_by_largest_moments
from optim_zoo.transforms.moments import Direction, bias, scale_by_moments
from optim_zoo.transforms.radam import rectification


@in_source_words
def LAMB(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    weight_decay: float = 0.0,
    exclude_from_weight_decay: rules.Patterns | None = None,
    exclude_from_layer_adaptation: rules.Patterns | None = None,
    name: str = "LAMB",
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Applies `lamb`; by default, leaves without weight decay have no trust ratio either.

    An empty ``exclude_from_layer_adaptation`` excludes nothing here; the source treats it like
    None.

    Args:
      weight_decay: The factor of the parameters in the direction, >= 0.
      exclude_from_weight_decay: Path patterns of leaves that are not decayed.
      exclude_from_layer_adaptation: Path patterns of leaves without trust ratio. By default, those
        of ``exclude_from_weight_decay``.
    """
    step = lamb(
        learning_rate,
        beta_1,
        beta_2,
        epsilon,
        weight_decay,
        exclude_from_weight_decay=patterns(exclude_from_weight_decay),
        exclude_from_layer_adaptation=patterns(
            exclude_from_weight_decay
            if exclude_from_layer_adaptation is None
            else exclude_from_layer_adaptation
        ),
    )
    return _clipped("LAMB", step, kwargs)


@in_source_words
def AdamW(
    weight_decay: Rate,
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    name: str = "AdamW",
    exclude_from_weight_decay: rules.Patterns | None = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Applies Keras's Adam with a weight decay that is not multiplied by the learning rate.

    ::

        x <- x - weight_decay x,   then Keras's Adam

    Args:
      weight_decay: A number >= 0 or a schedule: step -> weight decay, the first step being 0.
      amsgrad: Divides by the largest second moment instead of the latest one.
      exclude_from_weight_decay: Path patterns of leaves that are not decayed.
    """
    step = chain(
        keras.adam_direction(beta_1, beta_2, epsilon, amsgrad),
        scale_by_learning_rate(learning_rate),
    )
    return _clipped("AdamW", _decayed(step, weight_decay, exclude_from_weight_decay), kwargs)


@in_source_words
def SGDW(
    weight_decay: Rate,
    learning_rate: Rate = 0.001,
    momentum: float = 0.0,
    nesterov: bool = False,
    name: str = "SGDW",
    exclude_from_weight_decay: rules.Patterns | None = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Applies Keras's SGD with a weight decay that is not multiplied by the learning rate.

    ::

        x <- x - weight_decay x,   then Keras's SGD

    Args:
      weight_decay: A number >= 0 or a schedule: step -> weight decay, the first step being 0.
      momentum: In [0, 1]; 0 keeps no momentum.
      nesterov: Looks one step ahead along the momentum.
      exclude_from_weight_decay: Path patterns of leaves that are not decayed.
    """
    step = keras.sgd_inside(learning_rate, momentum, nesterov)
    return _clipped("SGDW", _decayed(step, weight_decay, exclude_from_weight_decay), kwargs)


@in_source_words
def LazyAdam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    name: str = "LazyAdam",
) -> optax.GradientTransformation:
    """Applies `lazy_adam` with eps added to the uncorrected root.

    `SparseRows` take the place of IndexedSlices: only their rows of the moments and of the
    parameters move. ``amsgrad`` is not supported.
    """
    refuse("tensorflow_addons.LazyAdam", amsgrad=(amsgrad, False))
    return chain(
        scale_by_adam_epsilon_hat(beta_1, beta_2, epsilon, lazy=True),
        scale_by_learning_rate(learning_rate),
    )


@in_source_words
def RectifiedAdam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: Rate = 0.0,
    amsgrad: bool = False,
    sma_threshold: float = 5.0,
    total_steps: int = 0,
    warmup_proportion: float = 0.1,
    min_lr: float = 0.0,
    name: str = "RectifiedAdam",
    *,
    exclude_from_weight_decay: rules.Patterns = (),
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Applies `radam` with decoupled weight decay, optional AMSGrad, and a schedule of its own.

    The source computes rho in float32, which is off by 6e-3 at beta_2 = 0.999. With
    ``sma_threshold=6`` it therefore rectifies one step too early, and this port does not.

    Args:
      weight_decay: The factor of the parameters in the direction: a number >= 0, or a schedule:
        step -> weight decay, the first step being 0.
      amsgrad: Divides by the largest second moment instead of the latest one.
      sma_threshold: The rho_t from which the step is rectified, >= 4; momentum alone below it.
      total_steps: The steps of a linear warmup and a linear decay; 0 for a constant learning rate.
      warmup_proportion: The warmup's share of them, in [0, 1].
      min_lr: The learning rate at the end of the decay, >= 0.
      exclude_from_weight_decay: Path patterns of leaves that are not decayed.
    """
    step = rectified_adam(
        warmup_then_linear(learning_rate, total_steps, warmup_proportion, min_lr, first=1),
        radam_direction(beta_1, beta_2, epsilon, sma_threshold),
        beta_1,
        beta_2,
        epsilon,
        weight_decay,
        amsgrad,
        exclude_from_weight_decay,
    )
    return _clipped("RectifiedAdam", step, kwargs)


def rectified_adam(
    learning_rate: Rate,
    direction: Direction,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: Rate,
    amsgrad: bool,
    exclude_from_weight_decay: rules.Patterns,
) -> optax.GradientTransformation:
    """Returns the chain of a rectified direction, weight decay and a learning rate."""
    piece: Any = functools.partial(scale_by_moments, state=ScaleByRadamState)
    scale = scale_by_largest_moments if amsgrad else piece
    return chain(
        scale("RectifiedAdam", direction, beta_1, beta_2, epsilon),
        add_scheduled_decay(weight_decay, exclude_from_weight_decay),
        scale_by_learning_rate(learning_rate),
    )


def radam_direction(
    beta_1: float, beta_2: float, epsilon: float, threshold: float, *, behind: int = 0
) -> Direction:
    """Returns the direction of `scale_by_radam`; ``behind``: see `rectification`."""
    ranges.check("sma_threshold", threshold, 4.0)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        rho, r = rectification(beta_2, t, behind=behind)
        mu_hat = mu / bias(beta_1, t)
        rectified = r * mu_hat / (jnp.sqrt(nu / bias(beta_2, t)) + epsilon)
        return jnp.where(rho >= threshold, rectified, mu_hat)

    return direction


@in_source_words
def Lookahead(
    optimizer: optax.GradientTransformation,
    sync_period: int = 6,
    slow_step_size: float = 0.5,
    name: str = "Lookahead",
) -> optax.GradientTransformation:
    """Applies `lookahead`; around `RectifiedAdam` it is the source's Ranger.

    Args:
      optimizer: The inner optimizer, with its learning rate.
      sync_period: The number of steps between synchronizations, >= 1.
      slow_step_size: The share of the way from the slow to the fast weights, in (0, 1].
    """
    return lookahead(optimizer, sync_period, slow_step_size)


def _decayed(
    step: optax.GradientTransformation, weight_decay: Rate, exclude: rules.Patterns | None
) -> optax.GradientTransformation:
    if not callable(weight_decay):
        ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    return decay_before(step, weight_decay, patterns(exclude))


def _clipped(
    port: str, step: optax.GradientTransformation, kwargs: dict[str, Any]
) -> optax.GradientTransformation:
    check_arguments(
        f"tensorflow_addons.{port}", kwargs, _keras_base.CLIPPING, _keras_base.REFUSED_BEFORE
    )
    return chain(_keras_base.clipping(kwargs), step)
