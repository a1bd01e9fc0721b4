"""``apex.optimizers`` (NVIDIA/apex 6424da3, ``csrc/multi_tensor_lamb.cu``)."""

import optax

from optim_zoo import rules
from optim_zoo.ports._arguments import Rate, in_source_words, refuse
from optim_zoo.ports.timm import fused_lamb


@in_source_words
def FusedLAMB(
    lr: Rate = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    adam_w_mode: bool = True,
    grad_averaging: bool = True,
    set_grad_none: bool = True,
    max_grad_norm: float = 1.0,
    use_nvlamb: bool = False,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """A leaf that is not decayed loses its trust ratio, unless ``use_nvlamb``.

    Gradients are clipped to the global norm ``max_grad_norm`` first (0: not). Without
    ``adam_w_mode`` the decay is added to the clipped gradients. Agrees with a transcription of the
    kernel to 1e-9 in float64, and with Apex's own reference in its tests to 2e-5 in float32.
    """
    refuse("apex.FusedLAMB", amsgrad=(amsgrad, False), set_grad_none=(set_grad_none, True))
    return fused_lamb(
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction=bias_correction,
        grad_averaging=grad_averaging,
        max_grad_norm=max_grad_norm,
        adapt_undecayed=use_nvlamb,
        l2=not adam_w_mode,
        exclude_from_weight_decay=exclude_from_weight_decay,
        exclude_from_layer_adaptation=() if use_nvlamb else exclude_from_weight_decay,
    )
