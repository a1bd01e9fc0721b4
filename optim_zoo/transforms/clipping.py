"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree, promoting, wide


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    gradient_norm: jax.Array  # (), float32: the norm of the last updates before clipping
    clipped_norm: jax.Array  # (), float32: the norm of the last updates after clipping


def clip_by_global_norm(
    max_norm: jax.typing.ArrayLike,
    axis_name: mesh_axes.AxisName = None,
    *,
    eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates so that their common norm is at most ``max_norm``.

    ::

        g <- min(1, max_norm / (G + eps)) g,   G = sqrt(sum over all leaves of |g|^2)

    This is ``tf.clip_by_global_norm`` in BERT's ``create_optimizer`` (arXiv 1211.5063). G is
    computed in float32 or wider and kept in the state; ``optax.clip_by_global_norm`` sums in the
    dtype of the gradients. G is right for float32 and bfloat16 numbers from 1e-28 to 1e25, also
    where their squares do not fit into float32. Rows of `SparseRows` with the same id count as one
    row, their sum.

    Args:
      max_norm: A number > 0. Infinity clips nothing, and the state still has G.
      axis_name: The mesh axes that the gradients are sharded over, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.
      eps: A finite number >= 0; it is 1e-6 in ``torch.nn.utils.clip_grad_norm_``.

    Returns:
      A transformation that reads all leaves at once; its state is `ClipByGlobalNormState`.

    Raises:
      ArgumentValueError: ``max_norm`` is not above 0, or ``eps`` is negative or not finite; in
        ``update``, ``axis_name`` names a mesh axis that a gradient does not vary over by its type.
      ArgumentTypeError: An argument has the wrong type.

    Example:
      ```python
      tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.lamb(1e-3))
      ```
    """
    ranges.check("max_norm", max_norm, 0.0, open_low=True)
    ranges.check("eps", eps, 0.0, open_high=True)
    mesh_axes.check_axis_name(axis_name)

    def init(params: Tree) -> ClipByGlobalNormState:
        mesh_axes.check_axis_matches(axis_name, params)
        zero = jnp.zeros((), jnp.float32)
        return ClipByGlobalNormState(zero, jnp.copy(zero))

    @promoting
    def update(
        updates: Tree, state: ClipByGlobalNormState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ClipByGlobalNormState]:
        del params, extra
        updates = jax.tree.map(
            lambda g: g.merged() if rows.is_sparse(g) else g, updates, is_leaf=rows.is_sparse
        )
        gradient_norm = norms.global_norm(updates, axis_name)
        # G = NaN then scales by NaN: no leaf passes unclipped next to a leaf that is not finite.
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
