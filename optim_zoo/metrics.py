"""What a step did, read from the state of the pieces that computed it."""

from collections.abc import Iterator
from typing import Any

import jax

from optim_zoo.transforms import (
    ClipByGlobalNormState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
)
from optim_zoo.tree import Tree, path_name

_READ = (ClipByGlobalNormState, ScaleByLearningRateState, ScaleByTrustRatioState)


def read(state: Tree) -> dict[str, jax.Array]:
    """Learning rate, norms and trust ratios of the step just made, out of optimizer state.

    ``learning_rate`` and ``gradient_norm`` (before clipping), shape ``()``; and of every leaf
    under layer adaptation ``trust_ratio/<path>``, ``parameter_norm/<path>`` (before the step) and
    ``update_norm/<path>`` (of the direction the ratio scaled), shape ``()``, or ``(layers,)``
    where the leaf holds several layers. Nothing is computed: a key is there where a piece of this
    library kept the value. Works on traced state, so that a jitted step can return it.

    Raises:
      ValueError: two pieces kept the same value, such as the rates of two groups of parameters.
    """
    metrics: dict[str, jax.Array] = {}

    def add(name: str, value: Tree) -> None:
        if name in metrics:
            raise ValueError(
                f"the state holds several values of {name}: read each part of it alone"
            )
        metrics[name] = _array(value)

    for piece in _pieces(state):
        match piece:
            case ScaleByLearningRateState():
                add("learning_rate", piece.learning_rate)
            case ClipByGlobalNormState():
                add("gradient_norm", piece.gradient_norm)
            case ScaleByTrustRatioState(trust_ratio=dict()):  # no dict where there is no leaf
                for field, values in piece._asdict().items():
                    for path, value in jax.tree.leaves_with_path(values):
                        add(f"{field}/{path_name(path)}", value)
    return metrics


def _pieces(state: Tree) -> Iterator[Any]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _READ))
    return (leaf for leaf in leaves if isinstance(leaf, _READ))


def _array(x: Tree) -> jax.Array:
    """``x``, or what it holds: an ``nnx.Optimizer`` keeps each array of its state in a variable."""
    (array,) = jax.tree.leaves(x)
    return array
