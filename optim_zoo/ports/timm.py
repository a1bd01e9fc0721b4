"""Optimizers of ``timm.optim`` (1.0.31), under its names and with its defaults.

Each agrees with timm to 1e-9 in float64; `RAdamLegacy`, which casts to float32, agrees to 2e-5, and
`LaProp`, which keeps its bias correction in float32, to 1e-7.

``lr``, ``betas``, ``eps``, ``weight_decay``, ``exclude_from_weight_decay`` and ``maximize`` mean
what they mean in `ports.torch`, and errors are raised as there. ``caution``,
``corrected_weight_decay``, ``clipping_threshold``, ``foreach`` and ``capturable`` are not supported
and must be left at their defaults::

    tx = ports.timm.Lamb(lr=1e-3, exclude_from_weight_decay=["bias$", "norm"])
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports import torch
from optim_zoo.ports._arguments import Rate, in_source_words, is_zero, refuse
from optim_zoo.ports._decay import decay_after, decay_before, times
from optim_zoo.ports._fused_lamb import fused_lamb
from optim_zoo.ports._laprop import scale_by_laprop
from optim_zoo.ports._pieces import chain, momentum_trace, negated
from optim_zoo.transforms import (
    ScaleByLarsTrustRatioState,
    ScaleByNadamState,
    add_decayed_weights,
    cast_like_params,
    scale_by_learning_rate,
    scale_by_rms,
)
from optim_zoo.transforms.adam import adam_direction
from optim_zoo.transforms.lars import lars_ratio
from optim_zoo.transforms.layerwise import scale_by_layer
from optim_zoo.transforms.moments import check_moments, moment, scale_by_moments


@in_source_words
def Lamb(
    lr: Rate = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    grad_averaging: bool = True,
    max_grad_norm: float | None = 1.0,
    trust_clip: bool = False,
    always_adapt: bool = False,
    caution: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies LAMB, which is Adam without a trust ratio on leaves without weight decay.

    That is timm's rule unless ``always_adapt``. `optim_zoo.lamb` adapts every leaf.

    ::

        g <- g / max(1, |all g| / max_grad_norm)
        u  = Adam's direction + weight_decay x
        x <- x - lr |x| / |u| u

    Args:
      bias_correction: Whether the moments are corrected for their start at 0.
      grad_averaging: False adds g to the first moment, and not (1 - b1) g.
      max_grad_norm: The limit of the global norm of the gradients, > 0; None does not clip.
      trust_clip: Limits the trust ratio to at most 1.
      always_adapt: Adapts leaves without weight decay too.
      decoupled_decay: Decays the parameters by lr weight_decay before their norms are taken.
    """
    refuse("timm.Lamb", caution=(caution, False), foreach=(foreach, None),
           corrected_weight_decay=(corrected_weight_decay, False))  # fmt: skip
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    ranges.check_learning_rate(lr)
    if max_grad_norm is not None:
        ranges.check("max_grad_norm", max_grad_norm, 0.0, open_low=True)
    inside = 0.0 if decoupled_decay else weight_decay
    outside = times(lr, weight_decay) if decoupled_decay else 0.0
    step = fused_lamb(
        lr,
        betas,
        eps,
        inside,
        bias_correction=bias_correction,
        grad_averaging=grad_averaging,
        max_grad_norm=max_grad_norm,
        adapt_undecayed=always_adapt or (decoupled_decay and not is_zero(weight_decay)),
        ratio_bounds=(None, 1.0) if trust_clip else None,
        exclude_from_weight_decay=exclude_from_weight_decay,
        exclude_from_layer_adaptation=() if always_adapt else exclude_from_weight_decay,
    )
    return decay_before(step, outside, exclude_from_weight_decay)


@in_source_words
def Lars(
    lr: Rate = 1.0,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    trust_coeff: float = 0.001,
    eps: float = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies LARS, which is SGD without a trust ratio on leaves without weight decay.

    That is timm's rule unless ``always_adapt``. The learning rate is outside the momentum.

    ::

        ratio = trust_coeff |x| / (|g| + weight_decay |x| + eps)     1 where |x| or |g| is 0
        m <- momentum m + (1 - dampening) ratio (g + weight_decay x)
        x <- x - lr m

    Args:
      momentum, dampening, nesterov: See `torch.SGD`.
      trust_coeff: The factor of the trust ratio, >= 0.
      trust_clip: LARC: the ratio divided by the learning rate is at most 1, also where it is 1
        because a norm is 0.
      always_adapt: Adapts leaves without weight decay too.
    """
    refuse("timm.Lars", foreach=(foreach, None))
    ranges.check_learning_rate(lr)
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)

    ranges.check("trust_coefficient", trust_coeff, 0.0, open_high=True)
    unclipped = lars_ratio(trust_coeff, eps)

    def adapted(learning_rate: Any) -> optax.GradientTransformation:
        def clipped(x: jax.Array, g: jax.Array, weight_decay: jax.typing.ArrayLike) -> jax.Array:
            return jnp.minimum(unclipped(x, g, weight_decay) / learning_rate, 1)

        return scale_by_layer(
            "timm.Lars",
            clipped if trust_clip else unclipped,
            state=ScaleByLarsTrustRatioState,
            weight_decay=weight_decay,
            exclude_from_weight_decay=exclude_from_weight_decay,
            exclude=() if always_adapt else exclude_from_weight_decay,
            layers=(),
            axis_name=None,
        )

    if is_zero(weight_decay) and not always_adapt:
        scale = None
    elif trust_clip and callable(lr):
        # The rate of each step, as wide as rates are here.
        of_step = optax.inject_hyperparams(adapted, hyperparam_dtype=jnp.result_type(float))
        scale = of_step(learning_rate=lr)
    else:
        scale = adapted(lr)
    return chain(scale, torch.SGD(lr, momentum, dampening, nesterov=nesterov))


@in_source_words
def LaProp(
    lr: Rate = 4e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies LaProp: momentum of normalized gradients (Ziyin, Wang and Ueda, arXiv 2002.04839).

    ::

        nu <- b2 nu + (1 - b2) g^2
        m  <- b1 m + (1 - b1) lr g / (sqrt(nu / (1 - b2^t)) + eps)
        a  <- b1 a + (1 - b1) lr
        x  <- x - lr / a m,   then  x <- x - lr weight_decay x
    """
    refuse("timm.LaProp", caution=(caution, False), foreach=(foreach, None),
           corrected_weight_decay=(corrected_weight_decay, False))  # fmt: skip
    b1, b2 = betas
    check_moments(b1, b2, eps)
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    ranges.check_learning_rate(lr)

    direction = scale_by_laprop(lr, b1, b2, eps)
    inner = chain(direction, cast_like_params())
    return decay_after(inner, times(lr, weight_decay), exclude_from_weight_decay)


@in_source_words
def Lookahead(
    base_optimizer: optax.GradientTransformation, alpha: float = 0.5, k: int = 6
) -> optax.GradientTransformation:
    """Applies Lookahead whose first synchronization does nothing.

    timm makes the slow weights at the first synchronization, from the fast weights. Repaired:
    `optim_zoo.lookahead`, whose slow weights start as the parameters.

    Args:
      base_optimizer: The inner optimizer, with its learning rate.
      alpha: The share of the way from the slow to the fast weights, in [0, 1].
      k: The number of steps between synchronizations, >= 1.
    """
    ranges.check_count("k", k, 1)
    ranges.check("alpha", alpha, 0.0, 1.0)
    return synchronize(
        base_optimizer, lambda t: t % k == 0, lambda t: jnp.where(t == k, 1.0, alpha), period=k
    )


@in_source_words
def NAdamLegacy(
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    schedule_decay: float = 4e-3,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies `torch.NAdam` with L2 regularization.

    Args:
      schedule_decay: The ``momentum_decay`` of `torch.NAdam`.
    """
    return torch.NAdam(
        lr,
        betas,
        eps,
        weight_decay,
        schedule_decay,
        exclude_from_weight_decay=exclude_from_weight_decay,
    )


@in_source_words
def NAdamW(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    clipping_threshold: float | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies AdamW whose first moment looks one step ahead, without correcting for it.

    ::

        u = (b1 mu + (1 - b1) g) / c1 / (sqrt(nu / c2) + eps) + weight_decay x
    """
    refuse("timm.NAdamW", caution=(caution, False), foreach=(foreach, None),
           corrected_weight_decay=(corrected_weight_decay, False), capturable=(capturable, False),
           clipping_threshold=(clipping_threshold, None))  # fmt: skip
    b1, b2 = betas
    adam = adam_direction(b1, b2, eps)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        return adam(g, moment(g, mu, b1), nu, t)

    return chain(
        negated(maximize),
        scale_by_moments("timm.NAdamW", direction, b1, b2, eps, state=ScaleByNadamState),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        scale_by_learning_rate(lr),
    )


@in_source_words
def RAdamLegacy(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies `torch.RAdam` with decoupled weight decay."""
    return torch.RAdam(
        lr, betas, eps, weight_decay, True, exclude_from_weight_decay=exclude_from_weight_decay
    )


@in_source_words
def RMSpropTF(
    lr: Rate = 1e-2,
    alpha: float = 0.9,
    eps: float = 1e-10,
    weight_decay: float = 0,
    momentum: float = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies RMSprop of TensorFlow 1: the mean square starts at 1 and eps is inside the root.

    ::

        nu <- alpha nu + (1 - alpha) g^2,   nu_0 = 1
        m  <- momentum m + lr g / sqrt(nu + eps)
        x  <- x - m

    Args:
      alpha: The decay rate of the averages, in [0, 1).
      momentum: The decay rate of m, >= 0. 0 keeps no momentum.
      centered: Subtracts the square of the average gradient from nu.
      decoupled_decay: Decays the parameters by lr weight_decay before the step, instead of adding
        weight_decay x to the gradient.
      lr_in_momentum: Whether the learning rate is inside the momentum, as above, or outside.
    """
    refuse("timm.RMSpropTF", caution=(caution, False), foreach=(foreach, None),
           corrected_weight_decay=(corrected_weight_decay, False))  # fmt: skip
    ranges.check_learning_rate(lr)
    rms = scale_by_rms(alpha, eps, initial_scale=1.0, centered=centered)
    trace = momentum_trace(momentum)
    if lr_in_momentum:
        step = chain(rms, scale_by_learning_rate(lr, last=False), trace, cast_like_params())
    else:
        step = chain(rms, trace, scale_by_learning_rate(lr))
    if decoupled_decay:
        return decay_before(step, times(lr, weight_decay), exclude_from_weight_decay)
    return chain(add_decayed_weights(weight_decay, exclude_from_weight_decay), step)
