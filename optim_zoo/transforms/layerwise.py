"""Scaling layer by layer, which the trust ratios of LAMB and LARS share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import layers as layers_lib
from optim_zoo import ranges, rows, rules
from optim_zoo.tree import Tree, by_path, check_floating, map_to_several, map_with_path, wide

# (|x|, |u|, weight decay) -> trust ratio, each of shape () or (layers,)
Ratio = Callable[[jax.Array, jax.Array, jax.typing.ArrayLike], jax.Array]


class ScaleByTrustRatioState(NamedTuple):
    """What the last step computed, as dicts from the path of every leaf that is not excluded.

    Each value is float32, of shape ``()``, or ``(layers,)`` where the leaf holds several layers.
    The dicts are flat because these are not like the parameters: in a tree like theirs each norm
    would inherit its parameter's sharding annotation from Flax, which does not fit a scalar.
    """

    trust_ratio: Tree  # ones before the first step
    parameter_norm: Tree  # of the parameters the step started from
    update_norm: Tree  # of the updates before they were scaled


def scale_by_layer(
    piece: str,
    ratio: Ratio,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude: rules.Patterns,
    layers: rules.Rules,
    axis_name: layers_lib.AxisName,
) -> optax.GradientTransformation:
    """Decays the updates u of each layer, then scales them by a ratio of norms.

    ::

        u <- ratio(|x|, |u|, weight_decay) (u + weight_decay x)

    Norms are Euclidean, in float32 or wider, one pass over each array, of u before it is decayed.

    Args:
      piece: its name, for messages.
      ratio: the formula, for one or several layers at once.
      weight_decay, exclude_from_weight_decay: see `add_decayed_weights`.
      exclude, layers, axis_name: see `scale_by_trust_ratio`.

    Raises:
      ValueError: see `scale_by_trust_ratio`.
    """
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
    rules.check_patterns("exclude_from_layer_adaptation", exclude)
    layers_lib.check_layer_rules(layers)
    layers_lib.check_axis_name(axis_name)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

    def init(params: Tree) -> ScaleByTrustRatioState:
        check_floating(params)
        rules.check_matches("exclude_from_weight_decay", exclude_from_weight_decay, params)
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
            raise ValueError(f"{piece} needs the parameters: update(grads, state, params)")
        rows.check_updates(piece, updates, params)
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
            undecayed = not decays or rules.matches(exclude_from_weight_decay, path)
            decay = 0.0 if undecayed else weight_decay
            decayed = u if undecayed else wide(u) + decay * wide(x)
            if excluded:
                return decayed, *(None,) * 3
            layers_lib.check_averaged(path, u, x)
            parameter_norm = layers_lib.norm(x, spec, axis_names)
            update_norm = layers_lib.norm(u, spec, axis_names)
            trust_ratio = ratio(parameter_norm, update_norm, decay)
            scaled = wide(decayed) * layers_lib.expand(trust_ratio, u.shape, spec)
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
