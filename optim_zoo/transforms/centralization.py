"""Gradient centralization (Yong et al., arXiv 2004.01461)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise
from optim_zoo.tree import Tree, map_with_path, wide


class CentralizeGradientsState(NamedTuple):
    """State of `centralize_gradients`, which is empty and only names the piece."""


def centralize_gradients(output_axis: int = -1, exclude: rules.Patterns = ()) -> Leafwise:
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
        raise ArgumentTypeError("output_axis", "be a whole number", output_axis)
    rules.check_patterns("exclude", exclude)

    def centralized(path: str, x: jax.Array) -> bool:
        return jnp.ndim(x) >= 2 and not rules.matches(exclude, path)

    def check_axis(path: str, x: jax.Array) -> None:
        if centralized(path, x) and not -jnp.ndim(x) <= output_axis < jnp.ndim(x):
            advice = f"{path} has shape {jnp.shape(x)}; exclude it"
            raise ArgumentValueError("output_axis", "be an axis of every leaf", output_axis, advice)

    def check(params: Tree) -> None:
        rules.check_matches("exclude", exclude, params)
        map_with_path(check_axis, params)

    def update(
        g: jax.Array, state: CentralizeGradientsState, leaf: Leaf
    ) -> tuple[jax.Array, CentralizeGradientsState]:
        if not centralized(leaf.path, g):
            return g, state
        kept = output_axis % g.ndim
        axes = tuple(axis for axis in range(g.ndim) if axis != kept)
        return wide(g) - jnp.mean(wide(g), axes, keepdims=True), state

    return leafwise(
        Declaration(
            name="centralize_gradients", update=update, state=CentralizeGradientsState, check=check
        )
    )
