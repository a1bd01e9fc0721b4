"""The trust ratio of LAMB (You et al., arXiv 1904.00962, Algorithm 2)."""

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.layerwise import ScaleByTrustRatioState, scale_by_layer
from optim_zoo.transforms.leafwise import Leafwise


@accepts_optax_arguments
def scale_by_trust_ratio(
    *,
    phi_bounds: ranges.Bounds | None = None,
    ratio_bounds: ranges.Bounds | None = None,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    exclude: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
) -> Leafwise:
    """Scales the updates u of each layer by its trust ratio.

    ::

        u <- ratio u,   ratio = clip(trust_coefficient phi(|x|) / (|u| + eps), *ratio_bounds)
        phi(z) = clip(z, *phi_bounds);   ratio = 1 where phi(|x|) or |u| is 0

    The norms are Euclidean, in float32 or wider, and each takes one pass over its array. They are
    right for float32 and bfloat16 numbers from 1e-28 to 1e25, also where their squares do not fit
    into float32. A layer of no numbers has norm 0, and so ratio 1. The source is arXiv 1904.00962.
    ``optax.scale_by_trust_ratio`` needs two passes and a masked copy, and cannot express layers
    inside an array.

    Args:
      phi_bounds: The bounds (low, high) of phi, None where a side is open. By default phi is the
        identity.
      ratio_bounds: The bounds (low, high) of the trust ratio, None where a side is open. By default
        it has no bounds.
      trust_coefficient: A finite number > 0, a factor of the trust ratio. The ratio 1 of a zero
        layer is not multiplied by it.
      eps: A finite number >= 0, added to the norm of the updates.
      exclude: Path patterns of the leaves whose updates pass unchanged. A pattern is a regular
        expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``.
      layers: Rules (path pattern, layer spec) for leaves that hold several layers, such as
        ``("blocks", stacked(0))``; see `optim_zoo.layers`. By default each leaf is one layer.
      axis_name: The mesh axes that the parameters are sharded over, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A piece whose state is `ScaleByTrustRatioState`: the trust ratio and the norms of every layer
      in the last step.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf, or a leaf does not fit its layer spec; in ``update``, the parameters are missing, or a
        gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(
          optim_zoo.scale_by_adam(),
          optim_zoo.scale_by_trust_ratio(layers=[("stack", optim_zoo.stacked(0))]),
          optim_zoo.scale_by_learning_rate(1e-3),
      )
      ```
    """
    ranges.check_bounds("phi_bounds", phi_bounds)
    ranges.check_bounds("ratio_bounds", ratio_bounds)
    ranges.check("trust_coefficient", trust_coefficient, 0.0, open_low=True, open_high=True)
    ranges.check("eps", eps, 0.0, open_high=True)

    def ratio(
        parameter_norm: jax.Array, update_norm: jax.Array, _: jax.typing.ArrayLike
    ) -> jax.Array:
        phi = _clip(parameter_norm, phi_bounds)
        defined = (phi != 0) & (update_norm != 0)
        quotient = phi / (jnp.where(defined, update_norm, 1) + eps) * jnp.asarray(trust_coefficient)
        return jnp.where(defined, _clip(quotient, ratio_bounds), 1)

    return scale_by_layer(
        "scale_by_trust_ratio",
        ratio,
        state=ScaleByTrustRatioState,
        exclude=exclude,
        layers=layers,
        axis_name=axis_name,
    )


def _clip(x: jax.Array, bounds: ranges.Bounds | None) -> jax.Array:
    return x if bounds is None else jnp.clip(x, *bounds)
