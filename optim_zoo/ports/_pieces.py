"""Pieces that only ports need: momentum of any size, and other places for eps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import ranges
from optim_zoo.ports._arguments import Rate, check_momentum, is_zero
from optim_zoo.transforms import (
    cast_like_params,
    scale_by_learning_rate,
    scale_by_rms,
)
from optim_zoo.transforms.adam import ScaleByLazyAdamState
from optim_zoo.transforms.leaf_by_leaf import chain_leaf_by_leaf
from optim_zoo.transforms.leafwise import Leafwise
from optim_zoo.transforms.moments import Direction, bias, scale_by_moments
from optim_zoo.transforms.momentum import trace_with_gain
from optim_zoo.transforms.radam import rectification
from optim_zoo.tree import Tree


def chain(*pieces: optax.GradientTransformation | None) -> optax.GradientTransformationExtraArgs:
    """Returns `chain_leaf_by_leaf` of the pieces that are not None; at least one must not be."""
    return chain_leaf_by_leaf(*(piece for piece in pieces if piece is not None))


def at(rate: Rate, count: jax.Array) -> Any:
    """Returns the rate at step ``count``, the first step being 0."""
    return rate(count) if callable(rate) else rate


def negated(maximize: bool) -> optax.GradientTransformation | None:
    """Returns the piece that negates the gradients for ``maximize``, else None."""
    return optax.scale(-1.0) if maximize else None


# Momentum.


def momentum_trace(
    momentum: Any,
    *,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
    highest: float = np.inf,
) -> Leafwise | None:
    """Returns `trace_momentum` for every momentum that the source accepts; None where it is 0.

    Args:
      momentum: from 0 to ``highest``.
      nesterov, dampening: see `trace_momentum`.
      highest: the largest momentum that the source accepts.
    """
    check_momentum(momentum, highest)
    if is_zero(momentum):
        return None
    damped = not is_zero(dampening)

    def gain(count: jax.Array) -> jax.typing.ArrayLike:
        return jnp.where(count == 0, 1.0, 1 - dampening) if damped else 1.0

    return trace_with_gain("trace_momentum", momentum, gain, nesterov=nesterov)


def rms_inside_momentum(
    learning_rate: Rate,
    decay: float,
    eps: float,
    momentum: float,
    *,
    centered: bool,
    initial_scale: float = 0.0,
) -> optax.GradientTransformation:
    """Returns `rmsprop` for every momentum >= 0: its learning rate is inside the momentum."""
    rms = scale_by_rms(decay, eps, centered=centered, initial_scale=initial_scale)
    trace = momentum_trace(momentum)
    if trace is None:
        return optax.chain(rms, scale_by_learning_rate(learning_rate))
    rate = scale_by_learning_rate(learning_rate, last=False)
    return optax.chain(rms, rate, trace, cast_like_params())


# Directions.


def epsilon_hat(b1: float, b2: float, eps: float) -> Direction:
    """Returns Adam's direction with eps added to the uncorrected root: "epsilon hat" in the paper.

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
    """Returns `scale_by_adam`, or with ``lazy`` `scale_by_lazy_adam`, with `epsilon_hat`."""
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
    """Returns RAdam's direction with eps added to the uncorrected root.

    ::

        u = r_t sqrt(c2) / c1 mu / (sqrt(nu) + eps)   where rho_t >= threshold
        u = below mu / c1                             elsewhere

    Sources that test ``>`` and sources that test ``>=`` agree, because rho_t is never exactly 5.

    Args:
      b1, b2, eps, threshold: see `scale_by_radam`.
      below: 1 for momentum alone, 0 for no step, -1 for a step in the wrong direction.
    """
    hat = epsilon_hat(b1, b2, eps)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        rho, r = rectification(b2, t)
        return jnp.where(rho >= threshold, r * hat(g, mu, nu, t), below * mu / bias(b1, t))

    return direction


def warmup_then_linear(
    learning_rate: Rate, total_steps: int, warmup_proportion: float, min_lr: float, first: int
) -> Rate:
    """Returns the schedule inside TensorFlow Addons' RectifiedAdam.

    Args:
      learning_rate: the learning rate at the end of the warmup.
      total_steps: the steps of warmup and decay together; 0 returns ``learning_rate`` unchanged.
      warmup_proportion: the warmup's share of these steps, in [0, 1].
      min_lr: the learning rate at the end of the decay, >= 0.
      first: the number of the first step: 1 in TensorFlow Addons.
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
