"""NVIDIA/DeepLearningExamples (729963d), ``Transformer-XL/pytorch/lamb.py``."""

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
    """LAMB without bias correction whose ratio is min(|x|, 10) / (|u| + eps).

    ``adam`` holds the ratio at 1. Agrees with the source to 1e-9 in float64.
    """
    return chain(
        scale_by_adam(*betas, eps, bias_correction=False),
        add_decayed_weights(weight_decay, exclude_from_weight_decay),
        None if adam else scale_by_trust_ratio(phi_bounds=(None, 10.0), eps=eps),
        scale_by_learning_rate(lr),
    )
