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
    """Decays the gradient g of each layer, and scales it to the norm of its parameters x.

    ::

        u = ratio (g + weight_decay x)
        ratio = trust_coefficient |x| / (|g| + weight_decay |x| + eps)
        ratio = 1 where |x| or |g| is 0

    The norm is that of g before weight decay, as in ``lars_optimizer.py`` of tensorflow/tpu (arXiv
    1708.03888). ``optax.lars`` uses the norm of g + weight_decay x. Norms are Euclidean, in float32
    or wider, and each takes one pass over its array.

    Args:
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      trust_coefficient: A finite number > 0, a factor of the trust ratio. The ratio 1 of a zero
        layer is not multiplied by it.
      eps: A finite number >= 0, added to the denominator of the trust ratio.
      exclude_from_weight_decay: Path patterns of the leaves that are not decayed. A pattern is a
        regular expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``.
      exclude: Path patterns of the leaves whose trust ratio is 1. They may still be decayed.
      layers: Rules (path pattern, layer spec) for leaves that hold several layers, such as
        ``("blocks", stacked(0))``; see `optim_zoo.layers`. By default each leaf is one layer.
      axis_name: The mesh axes that the parameters are sharded over, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A piece whose state is `ScaleByLarsTrustRatioState`: the trust ratio and the norms of every
      layer in the last step.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or a leaf does not fit its layer spec; in ``update``, the parameters are missing, or a
        gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(
          optim_zoo.scale_by_lars_trust_ratio(1e-4, exclude=["bias$"]),
          optim_zoo.scale_by_learning_rate(1.0, last=False),
          optim_zoo.trace_momentum(0.9),
          optim_zoo.cast_like_params(),
      )
      ```
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
    """Returns the formula of `scale_by_lars_trust_ratio`, for one or several layers at once.

    Raises:
      ArgumentValueError: ``eps`` is negative or not finite.
    """
    ranges.check("eps", eps, 0.0, open_high=True)

    def ratio(x: jax.Array, g: jax.Array, weight_decay: jax.typing.ArrayLike) -> jax.Array:
        defined = (x != 0) & (g != 0)
        quotient = trust_coefficient * x / jnp.where(defined, g + weight_decay * x + eps, 1)
        return jnp.where(defined, quotient, 1)

    return ratio
