"""lifeiteng/Optimizers (542e5c7), ``radam_optimizer.py`` and ``lookahead_optimizer.py``."""

import optax

from optim_zoo import ranges
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports import torch
from optim_zoo.ports._pieces import (0, 001, 1e, 8, 9, 999, False, RAdam, RAdamOptimizer, Rate, beta_1, beta_2, bool, def, epsilon, float, in_source_words, learning_rate, name, refuse, str, use_locking) -> optax.GradientTransformation:
    """`torch.RAdam`: eps beside the uncorrected root. Agrees with the source to 1e-9 in float64."""
    refuse("lifeiteng.RAdamOptimizer", use_locking=(use_locking, False))
    return torch.RAdam(learning_rate, (beta_1, beta_2), epsilon)


@in_source_words
def LookaheadOptimizer(
    optimizer: optax.GradientTransformation, k: int = 5, alpha: float = 0.5
) -> optax.GradientTransformation:
    """The first synchronization shrinks the weights to ``alpha`` times their value.

    The slow weights start at zero. Repaired: `optim_zoo.lookahead`, where they start as the
    parameters. Agrees with the source to 1e-9 in float64.
    """
    ranges.check_count("k", k, 1)
    ranges.check("alpha", alpha, 0.0, 1.0)
    return synchronize(optimizer, lambda t: t % k == 0, lambda t: alpha, slow_starts_at_zero=True)
