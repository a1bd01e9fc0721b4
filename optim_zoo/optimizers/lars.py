"""LARS (You, Gitman and Ginsburg, arXiv 1708.03888)."""

import jax
import optax

from optim_zoo import errors, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import (
    cast_like_params,
    scale_by_lars_trust_ratio,
    scale_by_learning_rate,
    trace_momentum,
)


@accepts_optax_arguments
def lars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    eps: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    *,
    lr_inside_momentum: bool = True,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude_from_layer_adaptation: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformation:
    """Momentum on gradients that are scaled layer by layer to the norm of the parameters.

    ::

        ratio = trust_coefficient |x| / (|g| + weight_decay |x| + eps),  1 where |x| or |g| is 0
        m <- momentum m + learning_rate ratio (g + weight_decay x)
        x <- x - m                          with nesterov  x - (momentum m + what was added to it)

    The order is ratio with decay inside, learning rate, momentum. The rate stands inside the
    momentum, as in the paper and in the code of tensorflow/tpu and MLPerf;
    ``lr_inside_momentum=False`` puts it outside, as torch implementations do, which differs while
    the rate changes. Leaves excluded from layer adaptation have ratio 1. ``optax.lars`` differs in
    the ratio (see `scale_by_lars_trust_ratio`), in the order of its arguments and in its default
    decay of 0. Agrees with ``lars_optimizer.py`` of tensorflow/tpu
    (7dc921f) and of MLPerf to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      momentum: in [0, 1).
      weight_decay, trust_coefficient, eps, layers, axis_name: see `scale_by_lars_trust_ratio`.
      nesterov: see `trace_momentum`.
      lr_inside_momentum: where the learning rate stands.
      exclude_from_weight_decay: path patterns (``re.search``) of leaves that are not decayed.
      exclude_from_layer_adaptation: path patterns of leaves whose ratio is 1.

    Raises:
      ValueError: see `scale_by_lars_trust_ratio`, `trace_momentum` and `scale_by_learning_rate`.
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, nesterov=nesterov)
    ratio = scale_by_lars_trust_ratio(
        weight_decay,
        trust_coefficient,
        eps,
        exclude_from_weight_decay=exclude_from_weight_decay,
        exclude=rules.named("exclude_from_layer_adaptation", exclude_from_layer_adaptation),
        layers=layers,
        axis_name=axis_name,
    )
    if not lr_inside_momentum:
        return optax.chain(ratio, trace, scale_by_learning_rate(learning_rate))
    rate = scale_by_learning_rate(learning_rate, last=False)
    return optax.chain(ratio, rate, trace, cast_like_params())
