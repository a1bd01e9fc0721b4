"""The trust ratio of LARS (You, Gitman and Ginsburg, arXiv 1708.03888)."""

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.transforms.layerwise import Ratio, ScaleByLarsTrustRatioState, scale_by_layer
from optim_zoo.transforms.leafwise import Leafwise


def scale_by_lars_trust_ratio(
    weight_decay: jax.typing.ArrayLike = 1e-4,
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    eps: jax.typing.ArrayLike = 0.0,
    *,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
) -> Leafwise:
    """Decays the gradient g of each layer and scales it to the norm of its parameters x.

    ::

        u = ratio (g + weight_decay x)
        ratio = trust_coefficient |x| / (|g| + weight_decay |x| + eps)
        ratio = 1 where |x| or |g| is 0

    The norm is of g before it is decayed, where ``optax.scale_by_trust_ratio`` in ``optax.lars``
    takes that of g + weight_decay x. As ``lars_optimizer.py`` of tensorflow/tpu.

    Args:
      weight_decay: >= 0.
      trust_coefficient: > 0.
      eps: >= 0.
      exclude_from_weight_decay: path patterns of leaves for which weight_decay is 0.
      exclude, layers, axis_name: see `scale_by_trust_ratio`.

    Raises:
      ValueError: see `scale_by_trust_ratio` and `add_decayed_weights`.
    """
    ranges.check("trust_coefficient", trust_coefficient, 0.0, open_low=True, open_high=True)
    return scale_by_layer(
        "scale_by_lars_trust_ratio",
        lars_ratio(trust_coefficient, eps),
        state=ScaleByLarsTrustRatioState,
        weight_decay=weight_decay,
        exclude_from_weight_decay=exclude_from_weight_decay,
        exclude=exclude,
        layers=layers,
        axis_name=axis_name,
    )


def lars_ratio(trust_coefficient: jax.typing.ArrayLike, eps: jax.typing.ArrayLike) -> Ratio:
    """The formula of `scale_by_lars_trust_ratio`, for one or several layers at once.

    Raises:
      ValueError: ``eps`` is negative.
    """
    ranges.check("eps", eps, 0.0, open_high=True)

    def ratio(x: jax.Array, g: jax.Array, weight_decay: jax.typing.ArrayLike) -> jax.Array:
        defined = (x != 0) & (g != 0)
        quotient = trust_coefficient * x / jnp.where(defined, g + weight_decay * x + eps, 1)
        return jnp.where(defined, quotient, 1)

    return ratio
