"""Optimizer of ``apex.optimizers`` (NVIDIA/apex 6424da3, ``csrc/multi_tensor_lamb.cu``)."""

import optax

from optim_zoo import rules
from optim_zoo.ports._arguments import Rate, in_source_words, refuse
from optim_zoo.ports._fused_lamb import fused_lamb


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
    """Applies LAMB, which is Adam without a trust ratio on leaves without weight decay.

    That is Apex's rule unless ``use_nvlamb``. `optim_zoo.lamb` adapts every leaf. Agrees with a
    transcription of the kernel to 1e-9 in float64, and with the reference in Apex's own tests to
    2e-5 in float32.

    ::

        g <- g / max(1, |all g| / max_grad_norm)
        u  = Adam's direction + weight_decay x
        x <- x - lr |x| / |u| u

    Args:
      lr: The learning rate, a number >= 0 or a schedule: step -> learning rate, from step 0.
      bias_correction: Whether the moments are corrected for their start at 0.
      betas: The decay rates of the moments, a pair of numbers in [0, 1).
      eps: The number that is added to the root of the second moment, >= 0.
      weight_decay: The factor of the parameters in u, >= 0.
      amsgrad: Not supported, as in Apex.
      adam_w_mode: False adds weight_decay x to the clipped gradients and not to u.
      grad_averaging: False adds g to the first moment, and not (1 - b1) g.
      set_grad_none: Concerns torch's gradients; must be left at its default.
      max_grad_norm: The limit of the global norm of the gradients, > 0; 0 does not clip.
      use_nvlamb: Adapts leaves without weight decay too.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed, in
        place of a parameter group with weight decay 0.

    Raises:
      ArgumentValueError: A number is out of its range; in ``init``, a pattern matches no leaf.
      NotImplementedError: ``amsgrad`` or ``set_grad_none`` is not its default.
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
