"""Leaf paths, and functions of arrays lifted to trees once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

Tree = Any  # any pytree; what its leaves are stands in the signature that uses it


def path_name(path: KeyPath) -> str:
    """The path of a leaf as one string: ``encoder/layer_0/attention/query/kernel``.

    An ``nnx.State`` holds each array as the attribute ``value`` of a variable; that last key is
    dropped, so that a linen dict and an ``nnx.State`` of the same model have the same paths.
    """
    match path:
        case (*outer, GetAttrKey(name="value")):
            path = tuple(outer)
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:  # a key class of a foreign pytree
            return str(key).strip(".[]'")


def leaf_paths(tree: Tree) -> list[str]:
    """The path of every leaf, in flattening order."""
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves of ``tree`` by their paths.

    Raises:
      ValueError: two leaves have the same path, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    paths = leaf_paths(tree)
    twice = sorted(path for path, count in Counter(paths).items() if count > 1)
    if twice:
        raise ValueError(f"several leaves have the path {', '.join(twice)}: rename one of them")
    return dict(zip(paths, jax.tree.leaves(tree), strict=True))


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``function(path, leaf, *leaves_of_rest)`` at every leaf of ``tree``."""
    return jax.tree.map_with_path(lambda path, *xs: function(path_name(path), *xs), tree, *rest)


def map_to_several(
    function: Callable[..., tuple[Any, ...]],
    outputs: int,
    tree: Tree,
    *rest: Tree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[Tree, ...]:
    """Maps a function that returns ``outputs`` values, and gives back as many trees.

    ``rest`` may hold whole subtrees where ``tree`` has leaves.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    structure: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    columns = [structure.flatten_up_to(other) for other in rest]
    results = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(structure.unflatten([result[i] for result in results]) for i in range(outputs))


def is_partial(tree: Tree) -> bool:
    """Whether ``tree`` is empty or a part of a larger one, as ``optax.masked`` hands it on."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return not leaves or any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """``x`` in float32, or as it is where its dtype is wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x))


def wide_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """The dtype arithmetic on ``x`` is done in: float32, or wider where ``x`` is wider.

    Raises:
      TypeError: ``x`` is complex; squares and norms here are those of real numbers.
    """
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise TypeError("complex parameters are not supported: hold real and imaginary part apart")
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def check_floating(params: Tree) -> None:
    """Raises unless every leaf of ``params`` is a real floating-point array.

    Raises:
      TypeError: one is not; its path and dtype are named.
    """
    for path, x in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            advice = (
                "hold real and imaginary part apart"
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "leave it out with optax.masked or optax.partition"
            )
            name = path_name(path) or "the parameter"
            raise TypeError(
                f"parameters must be floating-point, {name} has dtype {dtype}: {advice}"
            )


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """The mesh axes that ``x`` varies over by its type under ``shard_map``.

    Empty under ``jit`` and ``pmap``, and where ``check_vma=False`` leaves it untold.
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)
