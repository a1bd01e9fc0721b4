"""lifeiteng/Optimizers (542e5c7), ``radam_optimizer.py`` and ``lookahead_optimizer.py``."""

import optax

from optim_zoo import ranges
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports import torch
from optim_zoo.ports._arguments import Rate, in_source_words, refuse


@in_source_words
def RAdamOptimizer(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    use_locking: bool = False,
    name: str = "RAdam",
) -> optax.GradientTransformation:
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
    return synchronize(
        optimizer, lambda t: t % k == 0, lambda t: alpha, period=k, slow_starts_at_zero=True
    )
