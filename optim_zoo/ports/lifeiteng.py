"""Optimizers of lifeiteng/Optimizers (542e5c7).

The sources are ``radam_optimizer.py`` and ``lookahead_optimizer.py``.
"""

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
    """Applies `torch.RAdam`: eps is added to the uncorrected root.

    Agrees with the source to 1e-9 in float64.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the root, >= 0.
      use_locking: Must be left at its default.
      name: Accepted and ignored.
    """
    refuse("lifeiteng.RAdamOptimizer", use_locking=(use_locking, False))
    return torch.RAdam(learning_rate, (beta_1, beta_2), epsilon)


@in_source_words
def LookaheadOptimizer(
    optimizer: optax.GradientTransformation, k: int = 5, alpha: float = 0.5
) -> optax.GradientTransformation:
    """Applies Lookahead, which at first shrinks the weights to ``alpha`` times their value.

    The slow weights start at zero. Repaired: `optim_zoo.lookahead`, where they start as the
    parameters. Agrees with the source to 1e-9 in float64.

    Args:
      optimizer: The inner optimizer, with its learning rate.
      k: The number of steps between synchronizations, >= 1.
      alpha: The share of the way from the slow to the fast weights, in [0, 1].
    """
    ranges.check_count("k", k, 1)
    ranges.check("alpha", alpha, 0.0, 1.0)
    return synchronize(
        optimizer, lambda t: t % k == 0, lambda t: alpha, period=k, slow_starts_at_zero=True
    )
