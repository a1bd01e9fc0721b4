"""Optimizers of mlcommons/training (aa344c7, 80adb5f8) and tensorflow/tpu (7dc921f).

The sources are ``retired_benchmarks/bert/lamb_optimizer_v1.py``, ``mlperf_lars_optimizer.py``,
``resnet-tf2/tensorflow2/lars_optimizer.py`` and ``models/official/efficientnet/lars_optimizer.py``.
"""

import re

import optax

from optim_zoo import rules
from optim_zoo.optimizers.lamb import lamb
from optim_zoo.ports._arguments import (
    Rate,
    check_momentum,
    check_nesterov,
    in_source_words,
    patterns,
)
from optim_zoo.transforms import (
    cast_like_params,
    scale_by_lars_trust_ratio,
    scale_by_learning_rate,
)
from optim_zoo.transforms.momentum import trace_with_gain


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
    *,
    bias_correction: bool = True,
) -> optax.GradientTransformation:
    """Applies `lamb`; by default, leaves without weight decay have no trust ratio either.

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
      bias_correction: Whether the moments are corrected for their start at 0.
    """
    return lamb(
        learning_rate,
        beta_1,
        beta_2,
        epsilon,
        weight_decay_rate,
        bias_correction=bias_correction,
        exclude_from_weight_decay=patterns(exclude_from_weight_decay),
        exclude_from_layer_adaptation=patterns(
            exclude_from_layer_adaptation or exclude_from_weight_decay
        ),
    )


@in_source_words
def LARSOptimizer(
    learning_rate: Rate,
    momentum: float = 0.9,
    weight_decay: float = 0.0001,
    eeta: float = 0.001,
    epsilon: float = 0.0,
    name: str = "LARSOptimizer",
    skip_list: rules.Patterns | None = None,
    use_nesterov: bool = False,
) -> optax.GradientTransformation:
    """Applies `lars`; leaves whose path contains an entry of ``skip_list`` are excluded.

    Excluded leaves have no weight decay and the ratio 1.

    This is the code for TensorFlow 1, of MLPerf and of tensorflow/tpu. The code for TensorFlow 2
    silently replaces an ``epsilon`` of 0 by 1e-7; pass 1e-7 to follow it. Agrees with all three to
    1e-9 in float64.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      momentum: The decay rate of the momentum, >= 0, also 1 and above.
      weight_decay: The factor of the parameters that is added to the gradient, >= 0.
      eeta: The trust coefficient, >= 0.
      epsilon: The number that is added to the denominator of the ratio, >= 0.
      name: Accepted and ignored.
      skip_list: Strings, not patterns, that are searched for in the paths.
      use_nesterov: Looks one step ahead along the momentum.
    """
    rules.check_patterns("skip_list", patterns(skip_list))
    skipped = rules.named("skip_list", [re.escape(part) for part in patterns(skip_list)])
    check_momentum(momentum)
    if use_nesterov:
        check_nesterov(momentum)
    # `lars` refuses a momentum of 1, which the source accepts.
    trace = trace_with_gain("trace_momentum", momentum, lambda count: 1.0, nesterov=use_nesterov)
    return optax.chain(
        scale_by_lars_trust_ratio(
            weight_decay, eeta, epsilon, exclude_from_weight_decay=skipped, exclude=skipped
        ),
        scale_by_learning_rate(learning_rate, last=False),
        trace,
        cast_like_params(),
    )
