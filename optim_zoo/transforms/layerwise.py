"""Scaling layer by layer, which the trust ratios of LAMB and LARS share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rules
from optim_zoo.layers import mesh_axes, norms, specs
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise
from optim_zoo.tree import Tree, wide

# (|x|, |u|, weight decay) -> trust ratio, each of shape () or (layers,)
Ratio = Callable[[jax.Array, jax.Array, jax.typing.ArrayLike], jax.Array]


class ScaleByTrustRatioState(NamedTuple):
    """What the last step computed, as dicts from the path of every leaf that is not excluded.

    Each value is float32, of shape ``()``, or ``(layers,)`` where the leaf holds several layers.
    The dicts are flat because, in a tree like the parameters, Flax would give each norm the
    sharding annotation of its parameter, which does not fit a scalar.
    """

    trust_ratio: Tree  # ones before the first step
    parameter_norm: Tree  # of the parameters the step started from
    update_norm: Tree  # of the updates before they were scaled


class ScaleByLarsTrustRatioState(NamedTuple):
    """State of `scale_by_lars_trust_ratio`, with the fields of `ScaleByTrustRatioState`."""

    trust_ratio: Tree  # ones before the first step
    parameter_norm: Tree  # of the parameters the step started from
    update_norm: Tree  # of the updates before they were scaled


def scale_by_layer(
    piece: str,
    ratio: Ratio,
    *,
    state: Callable[..., Any],
    weight_decay: jax.typing.ArrayLike = 0.0,
    exclude_from_weight_decay: rules.Patterns = (),
    exclude: rules.Patterns,
    layers: rules.Rules,
    axis_name: mesh_axes.AxisName,
) -> Leafwise:
    """Decays the updates u of each layer, then scales them by a ratio of norms.

    ::

        u <- ratio(|x|, |u|, weight_decay) (u + weight_decay x)

    The norms are Euclidean, in float32 or wider; |u| is taken before weight decay is added.

    Args:
      piece: its name, for messages.
      ratio: the formula, for one or several layers at once.
      state: the NamedTuple of the piece, with the fields of `ScaleByTrustRatioState`.
      weight_decay, exclude_from_weight_decay: see `add_decayed_weights`.
      exclude, layers, axis_name: see `scale_by_trust_ratio`.

    Raises:
      ValueError: see `scale_by_trust_ratio`.
    """
    ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude_from_weight_decay", exclude_from_weight_decay)
    rules.check_patterns("exclude", exclude)
    specs.check_layer_rules(layers)
    mesh_axes.check_axis_name(axis_name)
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

    def check(params: Tree) -> None:
        rules.check_matches("exclude_from_weight_decay", exclude_from_weight_decay, params)
        rules.check_matches("exclude", exclude, params)
        specs.check_matches(layers, params)
        mesh_axes.check_axis_matches(axis_name, params)

    def init(path: str, x: jax.Array) -> dict[str, jax.Array]:
        spec = specs.layers_of(layers, path, x)
        if rules.matches(exclude, path):
            return {}
        starts = {"trust_ratio": 1, "parameter_norm": 0, "update_norm": 0}
        return {field: norms.fill(value, x, spec) for field, value in starts.items()}

    def update(
        u: jax.Array, state: ScaleByTrustRatioState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByTrustRatioState]:
        path, x = leaf.path, leaf.parameter
        decayed = decays and not rules.matches(exclude_from_weight_decay, path)
        decay = weight_decay if decayed else 0.0
        direction = wide(u) + decay * wide(x) if decayed else u
        axis_names = mesh_axes.axis_names_of(axis_name, path, x)
        if rules.matches(exclude, path):
            return direction, state
        mesh_axes.check_averaged(path, u, x)
        spec = specs.layers_of(layers, path, x)
        parameter_norm, update_norm = norms.norms_of([x, u], spec, axis_names)
        trust_ratio = ratio(parameter_norm, update_norm, decay)
        scaled = wide(direction) * norms.expand(trust_ratio, u.shape, spec)
        return scaled, state._replace(
            trust_ratio=trust_ratio.astype(jnp.float32),
            parameter_norm=parameter_norm.astype(jnp.float32),
            update_norm=update_norm.astype(jnp.float32),
        )

    return leafwise(
        Declaration(
            name=piece,
            update=update,
            state=state,
            by_path=ScaleByTrustRatioState._fields,
            init=init,
            check=check,
            params="required",
            waits_for="trust_ratio",
        )
    )
