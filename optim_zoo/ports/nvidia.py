"""Optimizer of NVIDIA/DeepLearningExamples (729963d), ``Transformer-XL/pytorch/lamb.py``."""

import optax

from optim_zoo import rules
from optim_zoo.ports._arguments import Rate, in_source_words
from optim_zoo.ports._pieces import chain
from optim_zoo.transforms import (
    add_decayed_weights,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)


@in_source_words
def Lamb(
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0,
    adam: bool = False,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies LAMB without bias correction whose ratio is min(|x|, 10) / (|u| + eps).

    Agrees with the source to 1e-9 in float64.

    Args:
      lr: The learning rate, a number >= 0 or a schedule: step -> learning rate, from step 0.
      betas: The decay rates of the moments, a pair of numbers in [0, 1).
      eps: The number that is added to the root of the second moment and to |u|, >= 0.
      weight_decay: The factor of the parameters in u, >= 0.
      adam: Holds the ratio at 1.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
    """
    return chain(
        scale_by_adam(*betas, eps, bias_correction=False),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        None if adam else scale_by_trust_ratio(phi_bounds=(None, 10.0), eps=eps),
        scale_by_learning_rate(lr),
    )
