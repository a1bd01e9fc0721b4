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
    """AdamW's direction, scaled layer by layer to the norm of the parameters.

    ::

        u  = mu_hat / (sqrt(nu_hat) + eps) + weight_decay x
        x <- x - learning_rate phi(|x|) / |u| u

    Algorithm 2 of the paper (version 5). The order is Adam's direction, decay, trust ratio,
    learning rate. A leaf excluded from weight decay keeps its trust ratio, as in ``optax.lamb``
    and NVIDIA's TensorFlow BERT; give the same patterns to ``exclude_from_layer_adaptation`` for
    what ALBERT, MLPerf and TensorFlow Addons do. There is no clipping of gradients inside, where
    Apex clips the global norm at 1. ``bias_correction=False`` is version 3 of the paper. Agrees
    with the paper's algorithm and with ``optax.lamb`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps, bias_correction: see `scale_by_adam`.
      weight_decay: >= 0; the paper uses 0.01. ``optax.lamb`` has ``eps_root`` in this place.
      phi_bounds, ratio_bounds, layers, axis_name: see `scale_by_trust_ratio`.
      exclude_from_weight_decay: path patterns (``re.search``) of leaves that are not decayed.
      exclude_from_layer_adaptation: path patterns of leaves whose ratio is 1.

    Raises:
      ValueError: see `scale_by_adam`, `add_decayed_weights`, `scale_by_trust_ratio` and
        `scale_by_learning_rate`.
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
