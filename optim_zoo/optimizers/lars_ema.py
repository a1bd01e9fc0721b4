"""LARS as the LAMB paper defines it (You et al., arXiv 1904.00962, Algorithm 1)."""

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
    """Scales a moving average of decayed gradients, layer by layer, to the norm of the parameters.

    ::

        m <- b1 m + (1 - b1) (g + weight_decay x)
        x <- x - learning_rate phi(|x|) / |m| m

    This is LARS as the LAMB paper defines it (arXiv 1904.00962, Algorithm 1). The order is weight
    decay, moving average, trust ratio, learning rate. Unlike in `lars`, the trust ratio is applied
    after the momentum and has no coefficient, so that a layer moves by learning_rate phi(|x|)
    whatever the size of its gradient. It agrees with the algorithm of the paper to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of the moving average m, in [0, 1).
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      phi_bounds: The bounds (low, high) of phi, None where a side is open. By default phi is the
        identity.
      ratio_bounds: The bounds (low, high) of the trust ratio, None where a side is open. By default
        it has no bounds.
      exclude_from_weight_decay: Path patterns of the leaves that are not decayed. A pattern is a
        regular expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``.
      exclude_from_layer_adaptation: Path patterns of the leaves whose trust ratio is 1. They may
        still be decayed.
      layers: Rules (path pattern, layer spec) for leaves that hold several layers, such as
        ``("blocks", stacked(0))``; see `optim_zoo.layers`. By default each leaf is one layer.
      axis_name: The mesh axes that the parameters are sharded over, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``AddDecayedWeightsState`` (empty), ``TraceMomentumEmaState`` (the count of steps and m, like
      the parameters, in float32 or wider), ``ScaleByTrustRatioState`` (trust ratio and norms of
      every layer) and ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or a leaf does not fit its layer spec; in ``update``, the parameters are missing, or a
        gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.lars_ema(0.01, weight_decay=0.01, exclude_from_weight_decay=["bias$"])
      ```
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
