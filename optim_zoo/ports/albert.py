"""Optimizer of google-research/albert (b772393), ``lamb_optimizer.py``."""

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
    """Applies `mlperf.LAMBOptimizer` without bias correction, as in version 3 of the paper.

    Agrees with the source to 2e-5 in float32.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      weight_decay_rate: The factor of the parameters in the direction, >= 0.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the root of the second moment, >= 0.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
      exclude_from_layer_adaptation: Path patterns of leaves without trust ratio. By default, and
        where it is empty, those of ``exclude_from_weight_decay``.
      name: Accepted and ignored.
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
