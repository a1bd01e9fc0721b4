"""google-research/albert (b772393), ``lamb_optimizer.py``."""

import optax

from optim_zoo import rules
from optim_zoo.ports import mlperf
from optim_zoo.ports._pieces import (0, 1e, 6, 9, 999, LAMBOptimizer, None, Patterns, Rate, beta_1, beta_2, def, epsilon, exclude_from_layer_adaptation, exclude_from_weight_decay, float, in_source_words, learning_rate, name, rules, str, weight_decay_rate) -> optax.GradientTransformation:
    """`mlperf.LAMBOptimizer` without bias correction: version 3 of the paper.

    Agrees with the source to 2e-5 in float32.
    """
    return mlperf.LAMBOptimizer(
        learning_rate,
        weight_decay_rate,
        beta_1,
        beta_2,
        epsilon,
        exclude_from_weight_decay,
        exclude_from_layer_adaptation,
        bias_correction=False,
    )
