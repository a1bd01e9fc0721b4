"""LARS as the LAMB paper writes it (You et al., arXiv 1904.00962, Algorithm 1)."""

import jax
import optax

from optim_zoo import errors, ranges, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import (
    add_decayed_weights,
    scale_by_learning_rate,
    scale_by_trust_ratio,
    trace_momentum,
)


@accepts_optax_arguments
def lars_ema(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    phi_bounds: ranges.Bounds | None = None,
    ratio_bounds: ranges.Bounds | None = None,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude_from_layer_adaptation: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformation:
    """A moving average of the decayed gradient, scaled layer by layer to the norm of parameters.

    ::

        m <- b1 m + (1 - b1) (g + weight_decay x)
        x <- x - learning_rate phi(|x|) / |m| m

    The order is decay, moving average, trust ratio, learning rate. Unlike `lars`, the ratio comes
    behind the momentum and has no coefficient, so a layer moves by learning_rate phi(|x|)
    whatever its gradient. Agrees with the paper's algorithm to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1: decay rate of the average, in [0, 1).
      weight_decay: >= 0.
      phi_bounds, ratio_bounds, layers, axis_name: see `scale_by_trust_ratio`.
      exclude_from_weight_decay: path patterns (``re.search``) of leaves that are not decayed.
      exclude_from_layer_adaptation: path patterns of leaves whose ratio is 1.

    Raises:
      ValueError: see the pieces.
    """
    with errors.renaming({"decay": "b1"}):
        average = trace_momentum(b1, ema=True)
    return optax.chain(
        add_decayed_weights(
            weight_decay, rules.named("exclude_from_weight_decay", exclude_from_weight_decay)
        ),
        average,
        scale_by_trust_ratio(
            phi_bounds=phi_bounds,
            ratio_bounds=ratio_bounds,
            exclude=rules.named("exclude_from_layer_adaptation", exclude_from_layer_adaptation),
            layers=layers,
            axis_name=axis_name,
        ),
        scale_by_learning_rate(learning_rate),
    )
