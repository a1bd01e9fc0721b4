"""LAMB (You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962)."""

import jax
import optax

from optim_zoo import ranges, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import (
    add_decayed_weights,
    chain_leaf_by_leaf,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)


@accepts_optax_arguments
def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    bias_correction: bool = True,
    phi_bounds: ranges.Bounds | None = None,
    ratio_bounds: ranges.Bounds | None = None,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude_from_layer_adaptation: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
    mask: rules.Mask = None,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Scales AdamW's direction, layer by layer, to the norm of the parameters.

    ::

        u  = (mu / c1) / (sqrt(nu / c2) + eps) + weight_decay x,   mu, nu, c1 and c2 as in adam
        x <- x - learning_rate phi(|x|) / |u| u

    This is Algorithm 2 of the paper (arXiv 1904.00962, version 5). The order is Adam's direction,
    weight decay, trust ratio, learning rate. The trust ratio phi(|x|) / |u| is 1 where phi(|x|) or
    |u| is 0.

    A leaf that is excluded from weight decay keeps its trust ratio, as in ``optax.lamb`` and
    NVIDIA's BERT for TensorFlow. ALBERT, MLPerf and TensorFlow Addons exclude it from both: pass
    the same patterns as ``exclude_from_layer_adaptation``. Gradients are not clipped; Apex clips
    their global norm to 1. ``bias_correction=False`` is version 3 of the paper.

    It agrees with the algorithm of the paper and with ``optax.lamb`` (0.2.8) to 1e-9 in float64. On
    a CPU, one leaf is finished before the next one begins: see `chain_leaf_by_leaf`.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed. The paper
        uses 0.01. ``optax.lamb`` has ``eps_root`` in this position.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
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
      mask: As in optax, a tree of bools like the parameters, or a function from the parameters to
        one. A leaf with False is not decayed, as if a pattern had excluded it.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByAdamState``
      (the count of steps, mu and nu; the moments are like the parameters, in float32 or wider),
      ``AddDecayedWeightsState`` (empty), ``ScaleByTrustRatioState`` (trust ratio and norms of every
      layer) and ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or a leaf does not fit its layer spec; in ``update``, the parameters are missing, or a
        gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.lamb(
          1e-3,
          weight_decay=0.01,
          exclude_from_weight_decay=["bias$", "norm"],
          layers=[("stack", optim_zoo.stacked(0))],
      )
      ```
    """
    return chain_leaf_by_leaf(
        scale_by_adam(b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root),
        add_decayed_weights(
            weight_decay,
            rules.named("exclude_from_weight_decay", exclude_from_weight_decay),
            mask=mask,
        ),
        scale_by_trust_ratio(
            phi_bounds=phi_bounds,
            ratio_bounds=ratio_bounds,
            exclude=rules.named("exclude_from_layer_adaptation", exclude_from_layer_adaptation),
            layers=layers,
            axis_name=axis_name,
        ),
        scale_by_learning_rate(learning_rate),
    )
