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
    """Subtracts the mean from the gradient of each output feature.

    ::

        g <- g - mean(g over all axes but output_axis)   for arrays of two axes or more

    The source is arXiv 2004.01461. ``optax.centralize`` keeps the first axis, which holds the
    output features in PyTorch. The kernels of Flax hold them in the last axis, which is the default
    here.

    Args:
      output_axis: The axis of the output features. A negative number counts from the last axis.
      exclude: Path patterns of the leaves that pass unchanged, such as biases that ``nn.scan`` has
        stacked. A pattern is searched for (``re.search``) in the path of a leaf.

    Returns:
      A piece that returns gradients with mean 0; its state is the empty `CentralizeGradientsState`.

    Raises:
      ArgumentValueError: A pattern is not a regular expression; in ``init``, a leaf of two axes or
        more does not have the axis, or a pattern matches no leaf.
      ArgumentTypeError: ``output_axis`` is not a whole number; ``exclude`` is not a list of
        strings; in ``init``, a parameter is not a real floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.centralize_gradients(), optim_zoo.adam(1e-3))
      ```
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
