"""What an optimizer state is made of, saved beside its numbers and compared before they are read.

::

    json.dump(saved_state.describe(state), file)
    ...
    like = jax.eval_shape(tx.init, params)
    saved_state.check(json.load(file), like)  # then restore into the shape of `like`

Numbers do not enter: a rate that has become a schedule, or another clipping norm, makes no
difference.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree

VERSION = 1  # of the layout of this library's states: raised when a piece changes its fields
_SHOWN = 5  # differences that an error lists; the others are of the same kind


def describe(state: Tree) -> dict[str, Any]:
    """The version of the layout, and dtype and shape of every array by its path, ready for JSON.

    ``{"version": 1, "arrays": {"0/mu/kernel": "float32(3, 4)", ...}}``. A path is the fields of
    named tuples, the keys of dicts and the indices of tuples, joined by ``/``; a key with a ``/``
    or ``"`` of its own is in quotes, so that no two arrays share a path. ``state`` may be any tree
    of arrays, keys (``key<fry>()``), ``jax.ShapeDtypeStruct``, and may be traced.

    Raises:
      ArgumentTypeError: a leaf is none of these and not a number.
    """
    leaves = jax.tree.leaves_with_path(state)
    arrays = {_name(path): _dtype_and_shape(path, leaf) for path, leaf in leaves}
    return {"version": VERSION, "arrays": arrays}


def differences(saved: Mapping[str, Any], state: Tree) -> list[str]:
    """What differs between ``saved``, made by `describe`, and ``state``: one line a difference.

    ``0/nu/kernel was float32(3, 4) and is bfloat16(3, 4)``; a path that only one of them has; the
    version. Empty where ``saved`` fits.

    Raises:
      ArgumentValueError: ``saved`` is not a description.
    """
    version, before = _read(saved)
    now = describe(state)["arrays"]
    lines = []
    if version != VERSION:
        lines.append(f"the layout of states was version {version} and is version {VERSION}")
    for path in sorted(before.keys() | now.keys()):
        name = path or "the only array"
        if path not in before:
            lines.append(f"{name} is missing in the checkpoint")
        elif path not in now:
            lines.append(f"{name} is only in the checkpoint")
        elif before[path] != now[path]:
            lines.append(f"{name} was {before[path]} and is {now[path]}")
    return lines


def check(saved: Mapping[str, Any], state: Tree) -> None:
    """Raises unless ``saved``, made by `describe`, is of a state like ``state``.

    Raises:
      ArgumentValueError: they differ, or ``saved`` is not a description. The message names the
        first few paths; `differences` lists them all.
    """
    lines = differences(saved, state)
    if not lines:
        return
    version, before = _read(saved)
    if version != VERSION:
        advice = "restore it with the version of optim_zoo it was saved with"
    elif before.keys() == describe(state)["arrays"].keys():
        advice = "take the shapes, dtypes and options it was saved with"
    else:
        advice = "take the optimizer and options it was saved with"
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    raise ArgumentValueError(
        "saved",
        "fit this optimizer and its parameters",
        saved,
        advice,
        sentence=f"the saved state does not fit this optimizer and its parameters "
        f"({'; '.join(lines[:_SHOWN] + more)}): {advice}",
        related=["state"],
    )


def _name(path: KeyPath) -> str:
    # Not `tree.leaf_paths`, which leaves out the field ``value`` of Flax's boxes.
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(json.dumps(key) if set(key) & set('/"') else key for key in keys)


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


def _read(saved: Any) -> tuple[int, dict[str, str]]:
    """The version and the arrays of a description; raises where ``saved`` is none."""
    match saved:
        case {"version": int(version), "arrays": Mapping() as arrays} if all(
            isinstance(text, str) for item in arrays.items() for text in item
        ):
            return version, dict(arrays)
    expected = "a description made by saved_state.describe"
    advice = "give the one that was saved with the state"
    raise ArgumentValueError(
        "saved",
        f"be {expected}",
        saved,
        advice,
        sentence=f"expected {expected}, got {str(saved)[:100]}: {advice}",
    )
