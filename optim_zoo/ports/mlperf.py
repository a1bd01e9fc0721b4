"""mlcommons/training (aa344c7, 80adb5f8) and tensorflow/tpu (7dc921f).

``retired_benchmarks/bert/lamb_optimizer_v1.py``, ``mlperf_lars_optimizer.py``,
``resnet-tf2/tensorflow2/lars_optimizer.py`` and ``models/official/efficientnet/lars_optimizer.py``.
"""

import re

import optax

from optim_zoo import rules
from optim_zoo.optimizers.lamb import lamb
from optim_zoo.ports._arguments import Rate, check_momentum, in_source_words, patterns
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
    """A leaf that is not decayed loses its trust ratio, unless the second list is given.

    Otherwise `lamb`. Agrees with the source to 2e-5 in float32.
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
    """`lars`; leaves whose path holds an entry of ``skip_list`` have no decay and ratio 1.

    The code for TensorFlow 1, of MLPerf and of tensorflow/tpu. That for TensorFlow 2 makes an
    ``epsilon`` of 0 into 1e-7 without a word; give 1e-7 to follow it. Agrees with all three to
    1e-9 in float64.
    """
    rules.check_patterns("skip_list", patterns(skip_list))
    skipped = rules.named("skip_list", [re.escape(part) for part in patterns(skip_list)])
    check_momentum(momentum)
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
