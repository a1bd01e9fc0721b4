"""google-research/albert (b772393), ``lamb_optimizer.py``."""

import optax

from optim_zoo import rules
from optim_zoo.ports import mlperf
from optim_zoo.ports._arguments import Rate, in_source_words


@in_source_words
def LAMBOptimizer(
    learning_rate: Rate,
    weight_decay_rate: float = 0.0,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    exclude_from_weight_decay: rules.Patterns | None = None,
    exclude_from_layer_adaptation: rules.Patterns | None = None,
    name: str = "LAMBOptimizer",
) -> optax.GradientTransformation:
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
