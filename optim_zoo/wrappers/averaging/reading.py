"""Reads the average that is kept in the state of an optimizer."""

from collections.abc import Iterator

import jax

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, by_path, leaf_paths, map_with_path
from optim_zoo.wrappers.averaging.state import AverageParametersState, outermost
from optim_zoo.wrappers.counters import check_types


def read(state: Tree, like: Tree | None = None) -> Tree:
    """Returns the average of the parameters that the state of an optimizer holds.

    Nothing is computed, except for the casts that ``like`` asks for.

    Args:
      state: The state of an optimizer, or any tree that holds one: the state of a chain or a
        wrapper, a ``TrainState``, an ``nnx.Optimizer`` or its ``opt_state``. It may be traced.
        Where it is replicated for ``jax.pmap``, every array has a leading axis of devices.
      like: The parameters. The average then has their containers and dtypes, and a parameter that
        no average holds, as under ``optax.masked``, is returned unchanged, and the averages of
        several groups are joined. None (the default) returns the average in float32 or wider.

    Returns:
      A tree like the parameters. Its arrays are those of the state and have their shardings, under
      ZeRO-1 divided over the devices. A step that donates the state deletes them.

    Raises:
      ArgumentTypeError: ``state`` holds no average, or it has lost its types, as in a checkpoint
        that was restored without a target, which `saved_state.rebuild` repairs.
      ArgumentValueError: ``state`` holds several averages of one parameter, or those of several
        groups and ``like`` is missing; or ``like`` lacks a parameter that is averaged.

    Example:
      ```python
      average = averaging.read(state, like=params)
      ```
    """
    found = list(_averages(state))
    if not found:
        check_types("averaging.read", state, [AverageParametersState])
        expected = "hold the state of average_parameters or average_uniformly"
        raise ArgumentTypeError("state", expected, type(state).__name__)
    if like is None:
        if len(found) > 1:
            advice = "pass the parameters as like"
            expected = "hold one average"
            raise ArgumentValueError("state", expected, f"those of {len(found)} groups", advice)
        return found[0]
    averages: dict[str, jax.Array] = {}
    for average in map(by_path, found):
        twice = sorted(averages.keys() & average.keys())
        if twice:
            expected, advice = "hold one average of each parameter", "read each part of it alone"
            sentence = f"{{argument}} must {expected}, got several of {twice[0]}: {advice}"
            raise ArgumentValueError("state", expected, twice, advice, sentence)
        averages |= average
    unknown = sorted(averages.keys() - set(leaf_paths(like)))
    if unknown:
        expected = "be the parameters whose average the state holds"
        sentence = f"averaging.read: {{argument}} must {expected}, but it has no {unknown[0]}"
        raise ArgumentValueError("like", expected, unknown, sentence=sentence)
    return map_with_path(
        lambda path, x: averages[path].astype(x.dtype) if path in averages else x, like
    )


def _averages(state: Tree) -> Iterator[Tree]:
    for node in outermost((AverageParametersState,), state):
        yield node.average
        yield from _averages(node.inner)
