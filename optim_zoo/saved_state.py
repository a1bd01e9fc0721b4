"""Descriptions of an optimizer state, which are saved with it and compared before it is restored.

::

    json.dump(saved_state.describe(state), file)
    ...
    like = jax.eval_shape(tx.init, params)
    saved_state.check(json.load(file), like)  # then restore into the shapes of `like`

A description holds the structure, shapes and dtypes of a state, and the types of its containers. It
does not hold numbers: a learning rate that has become a schedule, or another clipping norm, is no
difference. Another optimizer is one, and so is another setting that changes the formula, such as
Nesterov's momentum, because each has a state type of its own.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, is_box

VERSION = 3  # the version of the layout of states, raised when a piece changes its fields
_FIRST_WITH_CONTAINERS = 2
_SHOWN = 5  # the number of differences that an error lists
_PLAIN = ("dict", "list")  # the containers of a state that was restored without a target


def describe(state: Tree) -> dict[str, Any]:
    """Returns the version of the layout, and every array and container keyed by path, for JSON.

    ::

        {
            "version": 3,
            "arrays": {"0/mu/kernel": "float32(3, 4)", ...},
            "containers": {"": "tuple", "0": "ScaleByAdamState", "0/mu": "dict", ...},
        }

    A path is the fields of named tuples, the keys of dicts and the indices of tuples, joined by
    ``/``. A key that contains ``/`` or ``"`` is quoted, so that no two arrays have the same path. A
    container is the name of a named tuple, ``tuple``, ``list``, or ``dict`` for any mapping. Other
    containers, such as dataclasses, are not recorded.

    Args:
      state: Any tree of arrays, keys (described as ``key<fry>()``), numbers and
        ``jax.ShapeDtypeStruct``. It may be traced.

        In the state of an ``nnx.Optimizer`` each array is in a variable, whose field ends the path:
        ``0/mu/kernel/value``. Pass ``optimizer.opt_state``: in ``nnx.state(optimizer)``, named
        tuples are mappings, so that the states of ``adam`` and ``radam`` look the same. In a state
        that is replicated for ``jax.pmap``, the shapes begin with the number of devices. Pass
        ``jax.tree.map(lambda x: x[0], state)`` to compare it with one that is not replicated.

    Returns:
      A dict of numbers, strings and dicts, which ``json`` can write.

    Raises:
      ArgumentTypeError: A leaf of ``state`` is none of these.
    """
    arrays: dict[str, str] = {}
    containers: dict[str, str] = {}

    def walk(path: KeyPath, node: Any) -> None:
        children = jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)
        if len(children) == 1 and not children[0][0]:  # ``node`` itself
            arrays[_name(path)] = _dtype_and_shape(path, node)
            return
        if (container := _container(node)) is not None:
            containers[_name(path)] = container
        for key, child in children:
            walk((*path, *key), child)

    walk((), state)
    return {"version": VERSION, "arrays": arrays, "containers": containers}


def differences(saved: Mapping[str, Any], state: Tree) -> list[str]:
    """Lists the differences between a saved description and a state, one line for each.

    A line is ``0/nu/kernel was float32(3, 4) and is bfloat16(3, 4)``, ``0 was ScaleByAdamState and
    is ScaleByRadamState``, or names a path that only one of them has.

    Args:
      saved: What `describe` returned for the saved state.
      state: The state to compare it with, or its shapes: ``jax.eval_shape(tx.init, params)``.

    Returns:
      The lines; the list is empty if ``saved`` fits. If ``saved`` has another version of the
      layout, the only line says so, because the names of the fields may differ.

    Raises:
      ArgumentValueError: ``saved`` is not a description.
    """
    version, arrays, containers = _read(saved)
    if version != VERSION:
        return [f"the layout of states was version {version} and is version {VERSION}"]
    _, arrays_now, containers_now = _read(describe(state))
    return _lines(arrays, containers, arrays_now, containers_now)


def _lines(
    arrays: Mapping[str, str],
    containers: Mapping[str, str],
    arrays_now: Mapping[str, str],
    containers_now: Mapping[str, str],
) -> list[str]:
    """Lists the differences of two descriptions of the same version."""
    before, now = {**containers, **arrays}, {**containers_now, **arrays_now}
    parents = {path[:i] for path in before | now for i, x in enumerate(path) if x == "/"} | {""}
    lines = []
    for path in sorted(before.keys() | now.keys()):
        if (path in before) != (path in now) and path in parents:
            continue  # There is a line for each array below it.
        name = path or ("the only array" if path in arrays_now else "the state")
        if path not in before:
            lines.append(f"{name} is missing in the checkpoint")
        elif path not in now:
            lines.append(f"{name} is only in the checkpoint")
        elif before[path] != now[path]:
            lines.append(f"{name} was {before[path]} and is {now[path]}")
    return lines


def check(saved: Mapping[str, Any], state: Tree) -> None:
    """Raises unless a saved description fits a state.

    Args:
      saved: What `describe` returned for the saved state.
      state: The state to compare it with, or its shapes: ``jax.eval_shape(tx.init, params)``.

    Raises:
      ArgumentValueError: They differ, ``saved`` is not a description, or ``state`` was restored
        without a target, as dictionaries and lists, which `rebuild` repairs. The message names the
        first few paths that differ; `differences` lists them all.
    """
    lines = differences(saved, state)
    if not lines:
        return
    version, arrays, containers = _read(saved)
    _, arrays_now, containers_now = _read(describe(state))
    changed = {
        path: containers_now.get(path)
        for path, container in containers.items()
        if container != containers_now.get(path)
    }
    problem = "the saved state does not fit this optimizer and its parameters"
    if version != VERSION:
        advice = "restore it with the version of optim_zoo it was saved with"
    elif arrays == arrays_now and _lost_types(changed):
        problem = "the state was restored without a target, and has lost its types"
        advice = "rebuild it with saved_state.rebuild(tx.init(params), state)"
    elif arrays.keys() == arrays_now.keys() and containers == containers_now:
        advice = "take the shapes, dtypes and options it was saved with"
    else:
        advice = "take the optimizer and options it was saved with"
    raise ArgumentValueError(
        "saved",
        "fit this optimizer and its parameters",
        saved,
        advice,
        sentence=f"{problem} ({_shown(lines)}): {advice}",
        related=["state"],
    )


def rebuild(template: Tree, restored: Tree) -> Tree:
    """Returns the arrays of ``restored`` in the containers of ``template``.

    Orbax without a target, and ``flax.serialization.msgpack_restore``, return a state as nested
    dictionaries and lists, which no optimizer accepts in ``update``.

    The numbers do not show which optimizer they belong to: `check` a saved description as well.

    Args:
      template: A state like the saved one, or its shapes: ``jax.eval_shape(tx.init, params)``. Its
        numbers are not read.
      restored: A tree with the same arrays at the same paths; see `describe`. NumPy arrays become
        JAX arrays, and JAX arrays keep their sharding. For the ``opt_state`` of an
        ``nnx.Optimizer``, it is that of ``nnx.state(optimizer)`` or of ``nnx.to_pure_dict`` of it.

    Returns:
      A state with the containers of ``template`` and the arrays of ``restored``.

    Raises:
      ArgumentValueError: An array is missing, or has another shape or dtype. The message names the
        first few.

    Example:
      ```python
      like = jax.eval_shape(tx.init, params)
      state = saved_state.rebuild(like, checkpointer.restore(path))
      ```
    """
    lines = _lines(describe(restored)["arrays"], {}, describe(template)["arrays"], {})
    named, like = restored, template
    if lines and _unboxed(template) is not template:
        named, like = _unboxed(restored), _unboxed(template)
        lines = _lines(describe(named)["arrays"], {}, describe(like)["arrays"], {})
    if lines:
        expected, advice = "hold the arrays of template", "take the optimizer it was saved with"
        raise ArgumentValueError(
            "restored",
            expected,
            describe(restored)["arrays"],
            advice,
            sentence=f"{{argument}} must {expected} ({_shown(lines)}): {advice}",
            related=["template"],
        )
    by_name = {_name(path): x for path, x in jax.tree.leaves_with_path(named)}
    structure: Any = jax.tree.structure(template)
    leaves = [by_name[_name(path)] for path, _ in jax.tree.leaves_with_path(like)]
    return structure.unflatten([x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves])


def _unboxed(tree: Tree) -> Tree:
    """Returns ``tree`` with each Flax box replaced by its content."""
    nodes = jax.tree.leaves(tree, is_leaf=is_box)
    if not any(map(is_box, nodes)):
        return tree
    contents = [jax.tree.leaves(node) for node in nodes]
    structure: Any = jax.tree.structure(tree, is_leaf=is_box)
    return structure.unflatten([x[0] if len(x) == 1 else x for x in contents])


def _name(path: KeyPath) -> str:
    # Not `tree.leaf_paths`, which leaves out the field ``value`` of Flax's boxes.
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(json.dumps(key) if set(key) & set('/"') else key for key in keys)


def _container(node: Any) -> str | None:
    """Returns the name of a container in a description, or None where it is not recorded."""
    if isinstance(node, tuple):
        return type(node).__name__ if hasattr(node, "_fields") else "tuple"
    if isinstance(node, list):
        return "list"
    return "dict" if isinstance(node, Mapping) and not is_box(node) else None


def _lost_types(changed: Mapping[str, str | None]) -> bool:
    """Returns whether every container that differs has become a dict or list.

    Containers that are missing do not count, because Orbax drops empty ones.
    """
    kinds = set(changed.values()) - {None}
    return bool(kinds) and kinds <= set(_PLAIN)


def _shown(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "; ".join(lines[:_SHOWN] + more)


def _dtype_and_shape(path: KeyPath, leaf: Any) -> str:
    if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype"):
        where = _name(path) or "its root"
        raise ArgumentTypeError(
            "state",
            "be made of arrays",
            leaf,
            sentence=f"a {{argument}} is made of arrays, got {type(leaf).__name__} at {where}",
        )
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return f"{dtype}{tuple(jnp.shape(leaf))}"


def _read(saved: Any) -> tuple[int, dict[str, str], dict[str, str]]:
    """Returns the version, arrays and containers of a description.

    Raises:
      ArgumentValueError: ``saved`` is not a description.
    """
    match saved:
        case {"version": int(version), "arrays": Mapping() as arrays}:
            containers = saved.get("containers", {} if version < _FIRST_WITH_CONTAINERS else None)
            if _is_text(arrays) and _is_text(containers):
                return version, dict(arrays), dict(containers)
    expected = "a description made by saved_state.describe"
    advice = "pass the one that was saved with the state"
    raise ArgumentValueError(
        "saved",
        f"be {expected}",
        saved,
        advice,
        sentence=f"expected {expected}, got {str(saved)[:100]}: {advice}",
    )


def _is_text(entries: Any) -> bool:
    return isinstance(entries, Mapping) and all(
        isinstance(text, str) for item in entries.items() for text in item
    )
