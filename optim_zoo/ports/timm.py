"""``timm.optim`` (1.0.31).

Parameter groups without decay are said with ``exclude_from_weight_decay``. ``caution``,
``corrected_weight_decay``, ``clipping_threshold``, ``foreach`` and ``capturable`` are refused
unless left out. Each agrees with timm to 1e-9 in float64; RAdamLegacy, which casts to float32, to
2e-5, and LaProp, which keeps its bias correction in float32, to 1e-7.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports import torch
from optim_zoo.ports._arguments import Rate, in_source_words, is_zero, refuse
from optim_zoo.ports._pieces import (
    at,
    chain,
    decay_after,
    decay_before,
    momentum_trace,
    negated,
    times,
)
from optim_zoo.transforms import (
    ScaleByLarsTrustRatioState,
    ScaleByNadamState,
    add_decayed_weights,
    cast_like_params,
    clip_by_global_norm,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.adam import adam_direction, adam_state
from optim_zoo.transforms.lars import lars_ratio
from optim_zoo.transforms.layerwise import scale_by_layer
from optim_zoo.transforms.leafwise import Declaration, Leaf, leafwise, zero_count, zeros
from optim_zoo.transforms.moments import bias, check_moments, moment, scale_by_moments
from optim_zoo.tree import Tree


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
    """Without weight decay this is Adam: a leaf that is not decayed loses its trust ratio.

    That is timm's rule unless ``always_adapt``; `lamb` adapts every leaf. Gradients are clipped
    to the global norm ``max_grad_norm`` first, as in Apex. ``trust_clip`` holds the ratio to at
    most 1; ``decoupled_decay`` decays the parameters before their norms are taken.
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


def fused_lamb(
    lr: Rate,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    bias_correction: bool,
    grad_averaging: bool,
    max_grad_norm: float | None,
    adapt_undecayed: bool,
    ratio_bounds: ranges.Bounds | None = None,
    l2: bool = False,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude_from_layer_adaptation: rules.Patterns = (),
) -> optax.GradientTransformation:
    """The LAMB of Apex and timm: clipping, Adam's direction, decay, trust ratio, learning rate.

    Args:
      lr, betas, eps, weight_decay, bias_correction: see `lamb`.
      grad_averaging: see `scale_by_moments`.
      max_grad_norm: None or 0: no clipping.
      adapt_undecayed: whether there is a trust ratio where ``weight_decay`` is 0.
      ratio_bounds: see `scale_by_trust_ratio`.
      l2: whether the decay is added to the clipped gradient.
      exclude_from_weight_decay, exclude_from_layer_adaptation: see `lamb`.
    """
    b1, b2 = betas
    direction = scale_by_moments(
        "Lamb",
        adam_direction(b1, b2, eps, bias_correction=bias_correction),
        b1,
        b2,
        eps,
        state=adam_state(bias_correction=bias_correction),
        grad_averaging=grad_averaging,
    )
    decay = add_decayed_weights(weight_decay, exclude_from_weight_decay)
    ratio = scale_by_trust_ratio(exclude=exclude_from_layer_adaptation, ratio_bounds=ratio_bounds)
    clip = None
    if max_grad_norm is not None and not is_zero(max_grad_norm):
        clip = clip_by_global_norm(max_grad_norm)
    return chain(
        clip,
        *((decay, direction) if l2 else (direction, decay)),
        ratio if adapt_undecayed or not is_zero(weight_decay) else None,
        scale_by_learning_rate(lr),
    )


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
    """Without weight decay this is SGD: a leaf that is not decayed loses its trust ratio.

    That is timm's rule unless ``always_adapt``. The learning rate stands outside the momentum.
    ``trust_clip`` is LARC: the ratio, divided by the learning rate, is at most 1; also where it is
    1 because a norm is 0.
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


class LaPropState(NamedTuple):
    """State of `LaProp`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made
    average_rate: jax.Array  # (), float32 (float64 under x64): average of lr, from 0
    exp_avg: Tree  # like the parameters, in float32 or wider
    exp_avg_sq: Tree  # like the parameters, in float32 or wider


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
    """Momentum of normalised gradients (Ziyin, Wang and Ueda, arXiv 2002.04839).

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

    def begin(state: LaPropState) -> tuple[LaPropState, Any]:
        count = optax.safe_increment(state.count)
        rate = jnp.asarray(at(lr, state.count), float)
        average_rate = moment(rate, state.average_rate, b1)
        scale = jnp.where(average_rate > 0, rate / average_rate, 0)
        return state._replace(count=count, average_rate=average_rate), (
            rate,
            scale,
            bias(b2, count),
        )

    def update(g: jax.Array, state: LaPropState, leaf: Leaf) -> tuple[jax.Array, LaPropState]:
        rate, scale, c2 = leaf.shared
        g = g.astype(state.exp_avg_sq.dtype)
        nu = moment(jnp.square(g), state.exp_avg_sq, b2)
        normalised = rate * g / (jnp.sqrt(nu / c2) + eps)
        m = moment(normalised, state.exp_avg, b1)
        return -scale * m, state._replace(exp_avg=m, exp_avg_sq=nu)

    direction = leafwise(
        Declaration(
            name="timm.LaProp",
            update=update,
            state=LaPropState,
            like_params=("exp_avg", "exp_avg_sq"),
            init=lambda path, x: {"exp_avg": zeros(x), "exp_avg_sq": zeros(x)},
            init_shared=lambda: {**zero_count(), "average_rate": jnp.zeros((), float)},
            begin=begin,
        )
    )
    inner = chain(direction, cast_like_params())
    return decay_after(inner, times(lr, weight_decay), exclude_from_weight_decay)


@in_source_words
def Lookahead(
    base_optimizer: optax.GradientTransformation, alpha: float = 0.5, k: int = 6
) -> optax.GradientTransformation:
    """The first synchronization does nothing, for the slow weights are made there, from the fast.

    Repaired: `optim_zoo.lookahead`, whose slow weights start as the parameters.
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
    """`torch.NAdam` with L2 regularisation."""
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
    """AdamW whose first moment looks one step ahead, without correcting for it.

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
    """`torch.RAdam` with decoupled decay."""
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
    """TensorFlow 1's RMSprop: the mean square starts at 1, eps stands inside the root."""
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
