"""Gradient centralization (Yong et al., arXiv 2004.01461)."""

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rows, rules
from optim_zoo.tree import Tree, map_with_path, wide


def centralize_gradients(
    output_axis: int = -1, exclude: rules.Patterns = ()
) -> optax.GradientTransformation:
    """Makes the gradient of each output feature's weights have mean 0.

    ::

        g <- g - mean(g over all axes but output_axis)   for arrays of two axes or more

    ``optax.centralize`` keeps the first axis, which holds the output features in torch; the
    kernels of Flax hold them in the last.

    Args:
      output_axis: the axis of the output features.
      exclude: path patterns of leaves that stay as they are, such as biases stacked by ``nn.scan``.

    Raises:
      TypeError: ``output_axis`` is no whole number.
      ValueError: in ``init``, a leaf of two axes or more has no such axis, or a pattern matches
        no leaf.
    """
    if isinstance(output_axis, bool) or not isinstance(output_axis, int):
        raise TypeError(f"output_axis must be a whole number, got {output_axis!r}")
    rules.check_patterns("exclude_from_centralization", exclude)

    def check_axis(path: str, x: jax.Array, skip: bool) -> None:
        if not skip and jnp.ndim(x) >= 2 and not -jnp.ndim(x) <= output_axis < jnp.ndim(x):
            raise ValueError(
                f"output_axis must be an axis of every leaf, got {output_axis}: {path} has shape "
                f"{jnp.shape(x)}; exclude it"
            )

    def init(params: Tree) -> optax.EmptyState:
        rules.check_matches("exclude_from_centralization", exclude, params)
        map_with_path(check_axis, params, rules.mask(exclude, params))
        return optax.EmptyState()

    def update(
        updates: Tree, state: optax.EmptyState, params: Tree | None = None
    ) -> tuple[Tree, optax.EmptyState]:
        del params
        rows.check_updates("centralize_gradients", updates, updates)

        def centralize(g: jax.Array, skip: bool) -> jax.Array:
            if skip or g.ndim < 2:
                return g
            kept = output_axis % g.ndim
            axes = tuple(axis for axis in range(g.ndim) if axis != kept)
            return wide(g) - jnp.mean(wide(g), axes, keepdims=True)

        return jax.tree.map(centralize, updates, rules.mask(exclude, updates)), state

    return optax.GradientTransformation(init, update)
