"""Which mesh axes an array is sharded over inside a mapped function.

Inside ``shard_map`` and ``pmap`` a device holds a block of an array, and a squared norm must be
summed over the mesh axes that the array is sharded over. Under ``shard_map(check_vma=True)`` the
type of the array names them; elsewhere the user passes them as ``axis_name``. Under ``jit`` arrays
are global, and none of this is needed.
"""

from collections.abc import Sequence
from typing import Any

import jax

from optim_zoo import rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.tree import Tree, map_with_path, varying_axes

AxisName = str | Sequence[str] | rules.Rules | None


def check_axis_name(axis_name: AxisName) -> None:
    """Raises unless ``axis_name`` is None, a name, names, or rules (path pattern, names).

    Raises:
      ArgumentTypeError: it is none of these.
      ArgumentValueError: a pattern is not a regular expression.
    """
    if not _same_for_all(axis_name):
        rules.check_rules("axis_name", axis_name)  # type: ignore[arg-type]


def check_axis_matches(axis_name: AxisName, tree: Tree) -> None:
    """Raises `ArgumentValueError` where a rule in ``axis_name`` matches no leaf of ``tree``."""
    if not _same_for_all(axis_name):
        rules.check_matches("axis_name", [pattern for pattern, _ in axis_name], tree)  # type: ignore


def assign_axis_names(axis_name: AxisName, tree: Tree) -> Tree:
    """Returns the mesh axes that ``axis_name`` gives for each leaf of ``tree``: tuples of names.

    Raises:
      ArgumentValueError: the type of a leaf (``check_vma=True``) says that it is not sharded over
        one of these axes.
    """
    return map_with_path(lambda path, x: axis_names_of(axis_name, path, x), tree)


def axis_names_of(axis_name: AxisName, path: str, x: jax.Array) -> tuple[str, ...]:
    """Returns the mesh axes that ``axis_name`` gives for one array; see `assign_axis_names`.

    Raises:
      ValueError: the type of ``x`` says that it does not vary over one of them.
    """
    if _same_for_all(axis_name):
        names = _names(axis_name)
    else:
        names = _names(rules.first_match(axis_name, path, default=()))  # type: ignore[arg-type]
    # axis_index varies over its axis by definition. If its type does not say so, no type does.
    wrong = [
        name
        for name in sorted(set(names) - varying_axes(x))
        if varying_axes(jax.eval_shape(lambda name=name: jax.lax.axis_index(name)))
    ]
    if wrong:
        advice = "leave axis_name out where check_vma=True"
        raise ArgumentValueError(
            "axis_name",
            "name mesh axes over which the leaf varies",
            wrong,
            advice,
            sentence=f"{{argument}} names the mesh axes {wrong} for {path}, which does not vary "
            f"over them by its type: {advice}",
        )
    return names


def all_axis_names(axis_name: AxisName) -> set[str]:
    """Returns every mesh axis that ``axis_name`` gives for any leaf."""
    if _same_for_all(axis_name):
        return set(_names(axis_name))
    return {name for _, names in axis_name for name in _names(names)}  # type: ignore


def _same_for_all(axis_name: AxisName) -> bool:
    if axis_name is None or isinstance(axis_name, str):
        return True
    return isinstance(axis_name, Sequence) and all(isinstance(name, str) for name in axis_name)


def _names(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def check_averaged(path: str, update: jax.Array, parameter: jax.Array) -> None:
    """Raises where ``update`` is known to differ between devices that hold the same parameter."""
    apart = varying_axes(update) - varying_axes(parameter)
    if apart:
        axes, advice = sorted(apart), "average the gradient over them first (jax.lax.pmean)"
        raise ArgumentValueError(
            "updates",
            "be the same on all devices that hold the same parameter",
            axes,
            advice,
            sentence=f"the update of {path} varies over the mesh axes {axes}, which its parameter "
            f"does not: {advice}",
        )
