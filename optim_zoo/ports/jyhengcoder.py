"""Optimizer of jyhengcoder/Ranger_tensorflow (67e041e), ``ranger.py``."""

import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports._arguments import Rate, in_source_words
from optim_zoo.ports._pieces import warmup_then_linear
from optim_zoo.ports.tensorflow_addons import radam_direction, rectified_adam


@in_source_words
def Ranger(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    sma_threshold: float = 5.0,
    total_steps: int = 0,
    warmup_proportion: float = 0.1,
    min_lr: float = 0.0,
    k: int = 6,
    alpha: float = 0.5,
    name: str = "Ranger",
    *,
    exclude_from_weight_decay: rules.Patterns = (),
) -> optax.GradientTransformation:
    """Applies Ranger whose first step shrinks the weights to ``alpha`` times their value.

    It counts steps from 0. The slow weights, which start at zero, are therefore synchronized after
    the first step; and in rho_t the factor t (but not the power) is one less, so that r_1 is 1 and
    the first step is a full Adam step. Repaired: `optim_zoo.ranger`. Agrees with the source to 2e-5
    in float32.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the corrected root, >= 0.
      weight_decay: The factor of the parameters in the direction, >= 0.
      amsgrad: Divides by the largest second moment instead of the latest one.
      sma_threshold, total_steps, warmup_proportion, min_lr: See `tensorflow_addons.RectifiedAdam`.
      k: The number of steps between synchronizations, >= 1.
      alpha: The share of the way from the slow to the fast weights, in [0, 1].
      name: Accepted and ignored.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
    """
    ranges.check_count("k", k, 1)
    ranges.check("alpha", alpha, 0.0, 1.0)
    inner = rectified_adam(
        warmup_then_linear(learning_rate, total_steps, warmup_proportion, min_lr, first=0),
        radam_direction(beta_1, beta_2, epsilon, sma_threshold, behind=1),
        beta_1,
        beta_2,
        epsilon,
        weight_decay,
        amsgrad,
        exclude_from_weight_decay,
    )
    return synchronize(
        inner, lambda t: (t - 1) % k == 0, lambda t: alpha, period=k, slow_starts_at_zero=True
    )
