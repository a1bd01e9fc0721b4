"""The layer-wise trust ratio of LAMB (You et al., arXiv 1904.00962, Algorithm 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import layers as layers_lib
from optim_zoo import ranges, rules
from optim_zoo.tree import Tree, by_path, map_to_several, map_with_path, wide


class ScaleByTrustRatioState(NamedTuple):
    """What the last step computed, as dicts from the path of every leaf that is not excluded.

    Each value is float32, of shape ``()``, or ``(layers,)`` where the leaf holds several layers.
    The dicts are flat because these are not like the parameters: in a tree like theirs each norm
    would inherit its parameter's sharding annotation from Flax, which does not fit a scalar.
    """

    trust_ratio: Tree  # ones before the first step
    parameter_norm: Tree  # of the parameters the step started from
    update_norm: Tree  # of the updates before they were scaled


def scale_by_trust_ratio(
    *,
    phi_bounds: ranges.Bounds | None = None,
    ratio_bounds: ranges.Bounds | None = None,
    trust_coefficient: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.0,
    exclude: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: layers_lib.AxisName = None,
) -> optax.GradientTransformation:
    """Scales the updates u of each layer by its trust ratio.

    ::

        u <- ratio u,   ratio = clip(trust_coefficient phi(|x|) / (|u| + eps), *ratio_bounds)
        phi(z) = clip(z, *phi_bounds);   ratio = 1 where phi(|x|) or |u| is 0

    Norms are Euclidean, in float32 or wider, one pass over each array; a layer without entries
    has norm 0 and so ratio 1. ``optax.scale_by_trust_ratio`` takes two passes and a masked copy,
    and knows no layers inside an array.

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
    ranges.check("trust_coefficient", trust_coefficient, 0.0, open_low=True)
    ranges.check("eps", eps, 0.0)
    rules.check_patterns("exclude_from_layer_adaptation", exclude)
    layers_lib.check_layer_rules(layers)
    layers_lib.check_axis_name(axis_name)

    def ratio(parameter_norm: jax.Array, update_norm: jax.Array) -> jax.Array:
        phi = _clip(parameter_norm, phi_bounds)
        defined = (phi != 0) & (update_norm != 0)
        quotient = phi / (jnp.where(defined, update_norm, 1) + eps) * jnp.asarray(trust_coefficient)
        return jnp.where(defined, _clip(quotient, ratio_bounds), 1)

    def init(params: Tree) -> ScaleByTrustRatioState:
        rules.check_matches("exclude_from_layer_adaptation", exclude, params)
        layers_lib.check_matches(layers, params)
        layers_lib.check_axis_matches(axis_name, params)
        if not jax.tree.leaves(params):
            # optax.tree_map_params asks with an empty tree which parts of the state are like the
            # parameters; these are not, and it needs a leaf to see that.
            one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
            return ScaleByTrustRatioState(one, zero, jnp.copy(zero))

        def initial(x: jax.Array, excluded: bool, spec: layers_lib.Layers) -> tuple[Tree, ...]:
            if excluded:
                return (None,) * 3
            return tuple(layers_lib.fill(value, x, spec) for value in (1, 0, 0))

        seen = map_to_several(initial, 3, params, *static(params))
        return ScaleByTrustRatioState(*map(by_path, seen))

    def update(
        updates: Tree, state: ScaleByTrustRatioState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByTrustRatioState]:
        if params is None:
            raise ValueError("scale_by_trust_ratio needs the parameters: update(u, state, params)")
        if not jax.tree.leaves(params):
            return updates, state

        def scale(
            path: str,
            u: jax.Array,
            x: jax.Array,
            excluded: bool,
            spec: layers_lib.Layers,
            axis_names: tuple[str, ...],
        ) -> tuple[Tree, ...]:
            if excluded:
                return u, *(None,) * 3
            layers_lib.check_averaged(path, u, x)
            parameter_norm = layers_lib.norm(x, spec, axis_names)
            update_norm = layers_lib.norm(u, spec, axis_names)
            trust_ratio = ratio(parameter_norm, update_norm)
            scaled = wide(u) * layers_lib.expand(trust_ratio, u.shape, spec)
            seen = (trust_ratio, parameter_norm, update_norm)
            return scaled, *(value.astype(jnp.float32) for value in seen)

        axis_names = layers_lib.assign_axis_names(axis_name, params)
        paths = map_with_path(lambda path, _: path, params)
        scaled, *seen = map_to_several(
            scale, 4, paths, updates, params, *static(params), axis_names
        )
        return scaled, ScaleByTrustRatioState(*map(by_path, seen))

    def static(params: Tree) -> tuple[Tree, Tree]:
        """What is known of each leaf before any number is: is it excluded, and its layers."""
        return rules.mask(exclude, params), layers_lib.assign(layers, params)

    return optax.GradientTransformation(init, update)


def _clip(x: jax.Array, bounds: ranges.Bounds | None) -> jax.Array:
    return x if bounds is None else jnp.clip(x, *bounds)
