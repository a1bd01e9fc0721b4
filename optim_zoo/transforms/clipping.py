"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import layers, ranges
from optim_zoo.tree import Tree, wide


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    gradient_norm: jax.Array  # (), float32: of the last updates, before they were clipped


def clip_by_global_norm(
    max_norm: jax.typing.ArrayLike, axis_name: layers.AxisName = None
) -> optax.GradientTransformation:
    """Scales all updates so that their common norm is at most ``max_norm``.

    ::

        g <- g max_norm / max(G, max_norm),   G = sqrt(sum over all leaves of |g|^2)

    as ``tf.clip_by_global_norm`` in BERT's ``create_optimizer``. G is float32 or wider, where
    ``optax.clip_by_global_norm`` sums in the gradients' own dtype, and is kept in the state.

    Args:
      max_norm: > 0; ``inf`` clips nothing and only keeps G.
      axis_name: the mesh axes the gradients are cut over, as for `scale_by_trust_ratio`.

    Raises:
      ValueError: ``max_norm`` is not above 0.
    """
    ranges.check("max_norm", max_norm, 0.0, open_low=True)
    layers.check_axis_name(axis_name)

    def init(params: Tree) -> ClipByGlobalNormState:
        layers.check_axis_matches(axis_name, params)
        return ClipByGlobalNormState(jnp.zeros((), jnp.float32))

    def update(
        updates: Tree, state: ClipByGlobalNormState, params: Tree | None = None
    ) -> tuple[Tree, ClipByGlobalNormState]:
        del params
        axis_names = layers.assign_axis_names(axis_name, updates)
        squares = jax.tree.map(
            lambda g, names: layers.squared_norm(g, (), names), updates, axis_names
        )
        gradient_norm = jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros((), jnp.float32)))
        # So that G = NaN scales by NaN: no leaf passes unclipped beside a broken one.
        scale = jnp.where(gradient_norm <= max_norm, 1.0, max_norm / gradient_norm)
        clipped = jax.tree.map(lambda g: wide(g) * scale, updates)
        return clipped, ClipByGlobalNormState(gradient_norm.astype(jnp.float32))

    return optax.GradientTransformation(init, update)
