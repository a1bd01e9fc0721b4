"""jyhengcoder/Ranger_tensorflow (67e041e), ``ranger.py``."""

import optax

from optim_zoo import ranges, rules
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports._pieces import (0, 001, 1, 1e, 5, 6, 8, 9, 999, False, Patterns, Ranger, Rate, alpha, amsgrad, beta_1, beta_2, bool, def, epsilon, exclude_from_weight_decay, float, from, import, in_source_words, int, k, learning_rate, min_lr, name, optim_zoo, ports, radam_direction, rectified_adam, rules, sma_threshold, str, tensorflow_addons, total_steps, warmup_proportion, warmup_then_linear, weight_decay),
) -> optax.GradientTransformation:
    """Its first step shrinks the weights to ``alpha`` times their value, and is a full Adam step.

    It counts steps from 0: the slow weights, which start at zero, are synchronized after the
    first step, and in rho_t the factor t (but not the power) is one less, so that r_1 is 1.
    Repaired: `optim_zoo.ranger`. Agrees with the source to 2e-5 in float32.
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
    return synchronize(inner, lambda t: (t - 1) % k == 0, lambda t: alpha, slow_starts_at_zero=True)
