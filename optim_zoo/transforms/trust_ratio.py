"""The layer-wise trust ratio of LAMB (You et al., arXiv 1904.00962, Algorithm 2)."""

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rules
from optim_zoo.layers import mesh_axes
from optim_zoo.transforms.layerwise import ScaleByTrustRatioState, scale_by_layer
from optim_zoo.transforms.leafwise import Leafwise


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

    Norms are Euclidean, in float32 or wider, and take one pass over each array. They are right for
    float32 and bfloat16 entries from 1e-28 to 1e25, whose squares may not fit into float32. A layer
    without entries has norm 0 and so ratio 1. ``optax.scale_by_trust_ratio`` takes two passes and a
    masked copy, and has no layers inside an array.

    Args:
      phi_bounds: (low, high) of phi, None where a side is open; None: phi is the identity.
      ratio_bounds: (low, high) of the ratio itself.
      trust_coefficient: a factor of the ratio; not of the ratio 1 of a zero layer.
      eps: added to the norm of the updates.
      exclude: path patterns of leaves whose updates pass unchanged.
      layers: rules (path pattern, `stacked` | `split` | tuple of them) for arrays that hold
        several layers; see `optim_zoo.layers`.
      axis_name: under ``pmap`` and ``shard_map(check_vma=False)``, the mesh axes the parameters
        are cut over: a name, names, or rules (path pattern, names) where some leaves are cut and
        others are replicated. Not needed under ``jit``, nor where ``check_vma=True``.

    Raises:
      ValueError: an argument is out of range; ``update`` is called without parameters; in
        ``init``, a pattern matches no leaf or a leaf does not fit its layers.
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
