"""Finds the pieces inside a state, through chains, partitions and other wrappers."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from optim_zoo.transforms import (
    ScaleByLarsTrustRatioState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
)
from optim_zoo.transforms.clipping import ClipByGlobalNormState

# The names that the number of steps has in the states of pieces.
COUNTS = ("count", "step", "fast_steps")
# The fields that hold the state of an inner transformation.
_INNER = ("inner", "inner_state", "hyperparams_states")
# States that only show what the last step did.
_SHOWN = (ScaleByTrustRatioState, ScaleByLarsTrustRatioState, ClipByGlobalNormState)
_OURS = ("optim_zoo.transforms", "optim_zoo.optimizers", "optim_zoo.ports")


def map_pieces(
    function: Callable[[Any, bool], Any], state: Any, known: Collection[type], source: str
) -> Any:
    """Returns ``state`` with the state of every known piece replaced.

    Args:
      function: ``(state of a piece, after_rate) -> state``; ``after_rate`` says whether the piece
        comes after the learning rate in its chain, and so sees steps and not gradients.
      state: the state of an optimizer.
      known: the types of the states that ``function`` accepts. Pieces inside them are visited.
      source: where the new state comes from, for messages.

    Raises:
      NotImplementedError: a piece of this package keeps arrays, and its type is not known.
    """

    def visit(node: Any, after_rate: bool) -> Any:
        if isinstance(node, Mapping):
            return type(node)({k: visit(x, after_rate) for k, x in node.items()})  # type: ignore[call-arg]
        if not isinstance(node, tuple | list):
            return node
        # optax has no public name for the state of a schedule of inject_hyperparams.
        if type(node) in known or type(node).__name__ == "WrappedScheduleState":
            made: Any = function(node, after_rate)
            inner = {k: visit(getattr(node, k), False) for k in _INNER if k in made._fields}
            return made._replace(**inner)
        fields = getattr(node, "_fields", None)
        if fields is not None:
            ours = type(node).__module__.startswith(_OURS)
            if ours and not isinstance(node, _SHOWN) and jax.tree.leaves(node):
                raise NotImplementedError(
                    f"{type(node).__name__} keeps state whose name in {source} is not known"
                )
            if isinstance(node, _SHOWN):
                return node
            return type(node)(*(visit(getattr(node, k), after_rate) for k in fields))
        children = []
        for child in node:
            children.append(visit(child, after_rate))
            after_rate = after_rate or isinstance(child, ScaleByLearningRateState)
        return type(node)(children)

    return visit(state, False)
