"""The state in which an average of the parameters is kept."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from optim_zoo.tree import Tree


class AverageParametersState(NamedTuple):
    """State of `average_parameters` and `average_uniformly`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    average: Tree  # like the parameters, in float32 or wider
    inner: optax.OptState


def outermost(kinds: tuple[type[Any], ...], state: Tree) -> Iterator[Any]:
    """Yields the outermost nodes of these kinds in ``state``."""
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, kinds):
            yield node
