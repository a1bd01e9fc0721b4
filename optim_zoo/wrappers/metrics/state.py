"""The figures that pieces keep in their states, and the state of `with_metrics`."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import DictKey, SequenceKey

from optim_zoo.transforms import (
    ClipByGlobalNormState,
    ScaleByLarsTrustRatioState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
)
from optim_zoo.tree import Tree, leaves_with_path
from optim_zoo.wrappers.noise_scale import NoiseScaleState, ratio


class WithMetricsState(NamedTuple):
    """State of `with_metrics`. The norms are those of the last update that computed them."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: updates, modulo ``every``
    gradient_norm: Any  # (), float32; None where the inner state has it
    # Dicts from the path of each leaf without a trust ratio to (), float32; a zero where there is
    # no leaf at all.
    parameter_norm: Tree  # before the step
    update_norm: Tree  # of the updates that are returned
    inner: optax.OptState


PIECES = (
    ClipByGlobalNormState,
    NoiseScaleState,
    ScaleByLarsTrustRatioState,
    ScaleByLearningRateState,
    ScaleByTrustRatioState,
    WithMetricsState,
)
_GROUPED = (optax.transforms.PartitionState, optax.MaskedState)
_NORMS = ("parameter_norm", "update_norm")


def figures(
    state: Tree, group: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], jax.Array]]:
    """Yields the name, the parameter group and the value of everything that a piece keeps."""
    stops = (*PIECES, *_GROUPED)
    for path, node in jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, stops)):
        match node:
            case optax.transforms.PartitionState():
                for label, inner in node.inner_states.items():
                    # ``optax.partition`` masks each group.
                    part = inner.inner_state if isinstance(inner, optax.MaskedState) else inner
                    yield from figures(part, (*group, str(label)))
            case optax.MaskedState():
                place = [str(key.idx) for key in path if isinstance(key, SequenceKey)]
                place = place or [str(key.key) for key in path if isinstance(key, DictKey)]
                yield from figures(node.inner_state, (*group, *(place or ["masked"])))
            case ScaleByLearningRateState():
                yield "learning_rate", group, _array(node.rate)
            case ClipByGlobalNormState():
                yield "gradient_norm", group, _array(node.gradient_norm)
                yield "clipped_gradient_norm", group, _array(node.clipped_norm)
            case ScaleByTrustRatioState() | ScaleByLarsTrustRatioState():
                yield from _of_leaves(node._asdict(), group)
            case NoiseScaleState():
                averages = _array(node.trace), _array(node.squared_norm)
                yield "gradient_noise_scale", group, ratio(*averages)
                yield from figures(node.inner, group)
            case WithMetricsState():
                if node.gradient_norm is not None:
                    yield "gradient_norm", group, _array(node.gradient_norm)
                norms_of_leaves = {name: getattr(node, name) for name in _NORMS}
                yield from _of_leaves(norms_of_leaves, group)
                yield from figures(node.inner, group)


def _of_leaves(
    fields: Mapping[str, Tree], group: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], jax.Array]]:
    for name, values in fields.items():
        if isinstance(values, dict):  # There is no dict where there is no leaf.
            for path, value in leaves_with_path(values):
                yield f"{name}/{path}", group, _array(value)


def _array(x: Tree) -> jax.Array:
    """Returns ``x``, or the array in it where an ``nnx.Optimizer`` stores it in a variable."""
    (array,) = jax.tree.leaves(x)
    return array
