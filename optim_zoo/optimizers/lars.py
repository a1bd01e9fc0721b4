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
    """Applies momentum to gradients that are scaled, layer by layer, to the norm of the parameters.

    ::

        r  = trust_coefficient |x| / (|g| + weight_decay |x| + eps),   1 where |x| or |g| is 0
        d  = learning_rate r (g + weight_decay x)
        m <- momentum m + d
        x <- x - m                      with nesterov  x <- x - (momentum m + d)

    The order is trust ratio with weight decay inside, learning rate, momentum. The learning rate is
    inside the momentum, as in the paper (arXiv 1708.03888) and in the code of tensorflow/tpu and
    MLPerf. ``lr_inside_momentum=False`` applies it afterwards, as PyTorch implementations do; the
    two differ while the learning rate changes.

    ``optax.lars`` differs in r (see `scale_by_lars_trust_ratio`), in the order of its
    arguments, and in its default weight decay of 0. Ours agrees with ``lars_optimizer.py`` of
    tensorflow/tpu (7dc921f) and of MLPerf to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      momentum: The decay rate of m, in [0, 1).
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      trust_coefficient: A finite number > 0, a factor of the trust ratio.
      eps: A finite number >= 0, added to the denominator of the trust ratio.
      nesterov: Whether the update looks one step ahead along the momentum. Needs a momentum above
        0.
      lr_inside_momentum: Whether the learning rate is applied before the momentum.
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
      A transformation whose state is the tuple of the states of its pieces in their order:
      ``ScaleByLarsTrustRatioState`` (trust ratio and norms of every layer), ``TraceMomentumState``
      (the count of steps and m, like the parameters, in float32 or wider) and
      ``ScaleByLearningRateState`` (the step and the learning rate). With the learning rate inside
      the momentum, it comes before ``TraceMomentumState``.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or a leaf does not fit its layer spec; in ``update``, the parameters are missing, or a
        gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      biases = ["bias$"]
      tx = optim_zoo.lars(
          1.0, exclude_from_weight_decay=biases, exclude_from_layer_adaptation=biases
      )
      ```
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
