"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree, wide


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    gradient_norm: jax.Array  # (), float32: of the last updates, before they were clipped
    clipped_norm: jax.Array  # the same after it


def clip_by_global_norm(
    max_norm: jax.typing.ArrayLike,
    axis_name: mesh_axes.AxisName = None,
    *,
    eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates so that their common norm is at most ``max_norm``.

    ::

        g <- min(1, max_norm / (G + eps)) g,   G = sqrt(sum over all leaves of |g|^2)

    as ``tf.clip_by_global_norm`` in BERT's ``create_optimizer``. G is float32 or wider, where
    ``optax.clip_by_global_norm`` sums in the gradients' own dtype, and is kept in the state. It is
    right for float32 and bfloat16 entries from 1e-28 to 1e25, whose squares may not fit into
    float32. Rows of `SparseRows` with the same id count as one row, their sum.

    Args:
      max_norm: > 0; ``inf`` clips nothing and only keeps G.
      axis_name: the mesh axes the gradients are cut over, as for `scale_by_trust_ratio`.
      eps: >= 0; 1e-6 in ``torch.nn.utils.clip_grad_norm_``.

    Raises:
      ValueError: ``max_norm`` is not above 0, or ``eps`` negative; in ``update``, a gradient is
        told to be cut over a mesh axis that it does not vary over by its type.
    """
    ranges.check("max_norm", max_norm, 0.0, open_low=True)
    ranges.check("eps", eps, 0.0, open_high=True)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> ClipByGlobalNormState:
        mesh_axes.check_axis_matches(axis_name, params)
        zero = jnp.zeros((), jnp.float32)
        return ClipByGlobalNormState(zero, jnp.copy(zero))

    def update(
        updates: Tree, state: ClipByGlobalNormState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ClipByGlobalNormState]:
        del params, extra
        updates = jax.tree.map(
            lambda g: g.merged() if rows.is_sparse(g) else g, updates, is_leaf=rows.is_sparse
        )
        gradient_norm = norms.global_norm(updates, axis_name)
        # So that G = NaN scales by NaN: no leaf passes unclipped beside a broken one.
        norm = gradient_norm + eps
        scale = jnp.where(norm <= max_norm, 1.0, max_norm / norm)
        clipped = jax.tree.map(
            lambda g: rows.on_rows(lambda g: wide(g) * scale, g), updates, is_leaf=rows.is_sparse
        )
        clipped_norm = gradient_norm * scale
        return clipped, ClipByGlobalNormState(
            gradient_norm.astype(jnp.float32), clipped_norm.astype(jnp.float32)
        )

    return optax.GradientTransformationExtraArgs(init, update)
