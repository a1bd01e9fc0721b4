"""Optimizers of ``pytorch_optimizer`` (4.1.0), under its names and with its defaults.

Each agrees with the source to 1e-9 in float64. ``lr``, ``betas``, ``eps``, ``weight_decay``,
``exclude_from_weight_decay`` and ``maximize`` mean what they mean in `ports.torch`, and errors are
raised as there; the weight decay is decoupled. ``foreach`` must be left at its default. What the
source accepts through ``**kwargs`` is not supported::

    tx = ports.pytorch_optimizer.RAdam(lr=1e-3, degenerated_to_sgd=True)
"""

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports import michaelrzhang
from optim_zoo.ports._arguments import Rate, in_source_words, is_zero, refuse
from optim_zoo.ports._decay import decay_before, times
from optim_zoo.ports._pieces import at, chain, negated, radam_epsilon_hat
from optim_zoo.transforms import (
    ScaleByLarsTrustRatioState,
    ScaleByRadamState,
    ScaleByUncorrectedAdamState,
    add_decayed_weights,
    centralize_gradients,
    clip_by_global_norm,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.layerwise import scale_by_layer
from optim_zoo.transforms.moments import bias, scale_by_moments
from optim_zoo.transforms.momentum import trace_with_gain
from optim_zoo.transforms.radam import rectification


@in_source_words
def Lamb(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    rectify: bool = False,
    degenerated_to_sgd: bool = False,
    n_sma_threshold: int = 5,
    grad_averaging: bool = True,
    max_grad_norm: float = 1.0,
    adam: bool = False,
    pre_norm: bool = False,
    eps: float = 1e-6,
    foreach: bool | None = None,
    maximize: bool = False,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies LAMB that corrects only the first moment for its bias.

    The correction is outside the ratio; the second moment is never corrected. Repaired:
    `optim_zoo.lamb`.

    ::

        x <- x - lr weight_decay x
        u  = mu / (sqrt(nu) + eps)
        x <- x - lr / c1 min(|x|, 10) / (|u| + eps) u,   c1 = 1 - b1^t

    Args:
      weight_decouple: False adds weight_decay x to u instead.
      fixed_decay: Decays by weight_decay, without the learning rate.
      grad_averaging: False adds g to the first moment, and not (1 - b1) g.
      max_grad_norm: The limit of the global norm, >= 0; it is used with ``pre_norm`` only.
      adam: Holds the trust ratio at 1.
      pre_norm: Clips the gradients to the global norm ``max_grad_norm``.
      rectify, degenerated_to_sgd, n_sma_threshold: Not supported; must be left at their defaults.
    """
    refuse("pytorch_optimizer.Lamb", rectify=(rectify, False), foreach=(foreach, None),
           degenerated_to_sgd=(degenerated_to_sgd, False), n_sma_threshold=(n_sma_threshold, 5),
           )  # fmt: skip
    b1, b2 = betas
    ranges.check_decay("b1", b1)
    ranges.check_learning_rate(lr)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        return mu / (jnp.sqrt(nu) + eps)

    step = chain(
        negated(maximize),
        clip_by_global_norm(max_grad_norm, eps=eps) if pre_norm and max_grad_norm else None,
        scale_by_moments(
            "Lamb",
            direction,
            b1,
            b2,
            eps,
            state=ScaleByUncorrectedAdamState,
            grad_averaging=grad_averaging,
        ),
        None if weight_decouple else add_decayed_weights(weight_decay, exclude_from_weight_decay),
        None if adam else scale_by_trust_ratio(phi_bounds=(None, 10.0), eps=eps),
        scale_by_learning_rate(_divided_by_bias(lr, b1)),
    )
    fraction = _decay_fraction(lr, weight_decay, fixed_decay) if weight_decouple else 0.0
    return decay_before(step, fraction, exclude_from_weight_decay)


@in_source_words
def LARS(
    lr: Rate = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    dampening: float = 0.0,
    trust_coefficient: float = 1e-3,
    nesterov: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
) -> optax.GradientTransformation:
    """Applies LARS that neither decays nor adapts leaves with one axis or none, by their rank.

    ::

        ratio = trust_coefficient |x| / (|g| + weight_decay |x|)     1 where |x| is 0
        m <- momentum m + (1 - dampening) ratio (g + weight_decay x)
        x <- x - lr m

    Where the gradient of a layer is 0, the ratio is trust_coefficient / weight_decay, and not 1.
    The dampening applies from the first step on. The learning rate is outside the momentum.

    Args:
      momentum: The decay rate of m, in [0, 1). 0 keeps no momentum.
      dampening: The share of a gradient that is left out of m, in [0, 1].
      trust_coefficient: The factor of the trust ratio, >= 0.
      nesterov: Looks one step ahead along the momentum.
    """
    refuse("pytorch_optimizer.LARS", foreach=(foreach, None))
    ranges.check("trust_coefficient", trust_coefficient, 0.0, open_high=True)
    ranges.check_decay("momentum", momentum)
    ranges.check("dampening", dampening, 0.0, 1.0)

    def ratio(x: jax.Array, g: jax.Array, weight_decay: jax.typing.ArrayLike) -> jax.Array:
        denominator = g + weight_decay * x
        defined = (x > 0) & (denominator > 0)
        return jnp.where(defined, trust_coefficient * x / jnp.where(defined, denominator, 1), 1)

    adapted = scale_by_layer(
        "pytorch_optimizer.LARS", ratio, state=ScaleByLarsTrustRatioState,
        weight_decay=weight_decay, exclude=(), layers=(), axis_name=None,
    )  # fmt: skip
    trace = trace_with_gain(
        "pytorch_optimizer.LARS", momentum, lambda count: 1 - dampening, nesterov=nesterov
    )
    return chain(
        negated(maximize),
        optax.masked(adapted, lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 1, params)),
        None if is_zero(momentum) else trace,
        scale_by_learning_rate(lr),
    )


@in_source_words
def RAdam(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    n_sma_threshold: int = 5,
    degenerated_to_sgd: bool = False,
    eps: float = 1e-8,
    maximize: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies RAdam that neither moves nor decays in its first five steps, by default.

    Repaired: ``degenerated_to_sgd=True``, which takes momentum alone below the threshold; or
    `optim_zoo.radam`.

    Args:
      weight_decouple: False does not decay at all, as in the source.
      fixed_decay: Decays by weight_decay, without the learning rate.
      n_sma_threshold: The rho_t from which the step is rectified, >= 4.
      degenerated_to_sgd: Takes momentum alone below the threshold.
    """
    refuse("pytorch_optimizer.RAdam", foreach=(foreach, None))
    ranges.check_learning_rate(lr)
    b2 = betas[1]
    fraction = _decay_fraction(lr, weight_decay if weight_decouple else 0.0, fixed_decay)

    def gated(count: jax.Array) -> jax.Array:
        rho, _ = rectification(b2, optax.safe_increment(count))
        return jnp.where(rho >= n_sma_threshold, at(fraction, count), 0.0)

    step = _radam(lr, betas, eps, n_sma_threshold, 1.0 if degenerated_to_sgd else 0.0, maximize)
    decays = fraction if is_zero(fraction) or degenerated_to_sgd else gated
    return decay_before(step, decays, exclude_from_weight_decay)


@in_source_words
def Ranger(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.95, 0.999),
    alpha: float = 0.5,
    k: int = 6,
    n_sma_threshold: int = 5,
    degenerated_to_sgd: bool = False,
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    use_gc: bool = True,
    gc_conv_only: bool = False,
    eps: float = 1e-5,
    maximize: bool = False,
    foreach: bool | None = None,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies Ranger that takes its first five steps uphill, unless ``degenerated_to_sgd``.

    Below the threshold of RAdam the source takes a step with the wrong sign. Repaired:
    ``degenerated_to_sgd=True``, or `optim_zoo.ranger`.

    Args:
      alpha: The share of the way from the slow to the fast weights, in [0, 1].
      k: The number of steps between synchronizations, >= 1.
      n_sma_threshold: The rho_t from which the step is rectified, >= 4.
      degenerated_to_sgd: Takes momentum alone below the threshold.
      weight_decouple: False adds weight_decay x to the gradient instead.
      fixed_decay: Decays by weight_decay, without the learning rate.
      use_gc: Subtracts from the gradient of a matrix its mean over all axes but the first, which
        in torch is the axis of the output features.
      gc_conv_only: Not supported; must be left at its default.
    """
    refuse("pytorch_optimizer.Ranger", gc_conv_only=(gc_conv_only, False), foreach=(foreach, None))
    ranges.check_count("k", k, 1)
    ranges.check("alpha", alpha, 0.0, 1.0)
    ranges.check_learning_rate(lr)
    step = chain(
        negated(maximize),
        centralize_gradients(output_axis=0) if use_gc else None,
        None if weight_decouple else add_decayed_weights(weight_decay, exclude_from_weight_decay),
        _radam(lr, betas, eps, n_sma_threshold, 1.0 if degenerated_to_sgd else -1.0, False),
    )
    fraction = _decay_fraction(lr, weight_decay if weight_decouple else 0.0, fixed_decay)
    inner = decay_before(step, fraction, exclude_from_weight_decay)
    return synchronize(inner, lambda t: t % k == 0, lambda t: alpha, period=k)


@in_source_words
def Lookahead(
    optimizer: optax.GradientTransformation,
    k: int = 5,
    alpha: float = 0.5,
    pullback_momentum: str = "none",
) -> optax.GradientTransformation:
    """Applies `michaelrzhang.Lookahead` with another default of ``alpha``.

    Args:
      optimizer: The inner optimizer, with its learning rate.
      k: The number of steps between synchronizations, >= 1.
      alpha: The share of the way from the slow to the fast weights, in [0, 1].
      pullback_momentum: What a synchronization does with the momentum of SGD: ``"none"``,
        ``"reset"`` or ``"pullback"``.
    """
    return michaelrzhang.Lookahead(optimizer, k, alpha, pullback_momentum)


def _radam(
    lr: Rate,
    betas: tuple[float, float],
    eps: float,
    threshold: float,
    below: float,
    maximize: bool,
) -> optax.GradientTransformation:
    ranges.check("n_sma_threshold", threshold, 4.0)
    direction = radam_epsilon_hat(*betas, eps, threshold=threshold, below=below)
    return chain(
        negated(maximize),
        scale_by_moments("RAdam", direction, *betas, eps, state=ScaleByRadamState),
        scale_by_learning_rate(lr),
    )


def _divided_by_bias(lr: Rate, b1: float) -> Rate:
    return lambda count: at(lr, count) / bias(b1, optax.safe_increment(count))


def _decay_fraction(lr: Rate, weight_decay: float, fixed_decay: bool) -> Rate:
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    return weight_decay if fixed_decay else times(lr, weight_decay)
