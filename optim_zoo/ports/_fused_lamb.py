"""The LAMB that Apex and timm share."""

import optax

from optim_zoo import ranges, rules
from optim_zoo.ports._arguments import Rate, is_zero
from optim_zoo.ports._pieces import chain
from optim_zoo.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.adam import adam_direction, adam_state
from optim_zoo.transforms.moments import scale_by_moments


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
    """Returns the LAMB of Apex and timm: clipping, Adam's direction, decay, trust ratio, learning
    rate.

    Args:
      lr, betas, eps, weight_decay, bias_correction: See `lamb`.
      grad_averaging: See `scale_by_moments`.
      max_grad_norm: The limit of the global norm; None or 0 does not clip.
      adapt_undecayed: Whether there is a trust ratio where ``weight_decay`` is 0.
      ratio_bounds: See `scale_by_trust_ratio`.
      l2: Whether the decay is added to the clipped gradient.
      exclude_from_weight_decay, exclude_from_layer_adaptation: See `lamb`.
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
